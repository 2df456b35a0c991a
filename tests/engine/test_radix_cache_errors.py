"""Errors between match and report, on SGLang's own tree, allocator, pool and requests without an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from a3_sglang.fusion import executor as executor_module
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.integration import compat
from a3_sglang.integration.circuit_breaker import LIMIT
from a3_sglang.integration.request_state import state_of
from a3_sglang.matching.search import PromptSearch
from a3_sglang.reporting.report import Reason
from helpers.tree import SLOTS, Cache, private_slots, text, tokens

# The constructors used here are those of the newest supported SGLang.
pytestmark = pytest.mark.engine


def admitted(cache: Cache, generator: torch.Generator, **options: Any) -> tuple[Any, list[int]]:
    """A request over 100 tokens of a new donor, ready to be fused, and its prompt."""
    donor = text(generator, 120)
    cache.donate(donor)
    prompt = donor[20:] + tokens(generator, 40)
    req = cache.request(prompt, **options)
    assert (cache.match(req), cache.load(req)) == (100, 100)
    return req, prompt


def assert_full_prefill(cache: Cache, req: Any, prompt: list[int]) -> None:
    assert state_of(req).match.branch is None
    exact = cache.model.prefill64(torch.tensor(prompt))
    for found, expected in zip((cache.model.keys, cache.model.values), exact, strict=False):
        for layer in range(cache.model.depth):
            assert_close(
                found[layer][private_slots(req)].double(),
                expected[layer][:100],
                rtol=1e-4,
                atol=1e-4,
            )


def fails(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("injected")


def fails_once(function: Callable[..., Any], before: int = 0) -> Callable[..., Any]:
    """``function``, which fails once, after ``before`` successful calls."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return fails() if calls == before + 1 else function(*args, **kwargs)

    return call


@pytest.mark.parametrize("selector", ["probe", "reuse", "epic", "a3"])
@pytest.mark.parametrize("stage", ["copy", "probe", "select", "recompute", "extend"])
def test_an_error_in_any_stage_is_a_full_prefill(stage, selector, generator, monkeypatch, caplog):
    """No other request is affected: the batch runs once more as in stock SGLang."""
    cache = Cache()
    req, prompt = admitted(cache, generator, selector=selector)
    executor, run = cache.executor, lambda: "result"
    if stage == "copy":
        monkeypatch.setattr(executor, "copy", fails)
    elif stage == "probe":
        monkeypatch.setattr(executor, "_probe", fails)
    elif stage == "select":
        monkeypatch.setattr(executor_module, "_select", fails)
    elif stage == "recompute":
        monkeypatch.setattr(executor, "recompute", fails_once(executor.recompute))
    else:
        run = fails_once(run)
    assert cache.fuse(req, run=run) == "result"
    assert "injected" in caplog.text
    assert_full_prefill(cache, req, prompt)
    (report,) = req.customized_info["a3"]
    assert report["reason"] == Reason.ERROR
    assert (report["reused"], report["recomputed"]) == (0, 100)
    assert not cache.tree.breaker.open
    cache.allocator.free(private_slots(req))
    assert cache.all_slots_back()


def test_only_a_request_that_cannot_be_recomputed_is_aborted(generator, monkeypatch):
    """Of two requests in a batch, the KV of one cannot be computed."""
    cache = Cache()
    (req, prompt), (other, _) = (admitted(cache, generator) for _ in "ab")
    for pool in (*cache.model.keys, *cache.model.values):
        pool[private_slots(other)] = torch.nan
    real = FusionRequest.select_all
    monkeypatch.setattr(cache.executor, "select", fails)
    monkeypatch.setattr(
        FusionRequest, "select_all", lambda request: fails() if request.tokens.tolist() != prompt else real(request)
    )
    assert cache.fuse(req, other, run=lambda: "result") == "result"
    assert_full_prefill(cache, req, prompt)
    assert req.to_finish is None
    assert other.to_finish.status_code == 500
    for pool in (*cache.model.keys, *cache.model.values):
        assert torch.equal(
            pool[private_slots(other)],
            torch.zeros_like(pool[private_slots(other)]),
        )


def test_fusion_is_turned_off_after_repeated_errors(generator, monkeypatch, caplog):
    cache = Cache()
    failing = [*range(LIMIT - 1), *range(LIMIT + 1, 2 * LIMIT)]
    for number in range(2 * LIMIT + 1):
        with monkeypatch.context() as patch:
            if number in failing:
                patch.setattr(cache.executor, "select", fails)
            assert not cache.tree.breaker.open
            req, _ = admitted(cache, generator)
            cache.fuse(req)
            cache.allocator.free(private_slots(req))
        cache.evict(SLOTS)
        if number == failing[-1]:
            # A success after two failures resets the count.
            assert not cache.tree.breaker.open
    with monkeypatch.context() as patch:
        patch.setattr(cache.executor, "select", fails)
        for _ in range(LIMIT):
            assert not cache.tree.breaker.open
            req, _ = admitted(cache, generator)
            cache.fuse(req)
            cache.allocator.free(private_slots(req))
            cache.evict(SLOTS)
    assert cache.tree.breaker.open
    assert "off after 3 failures in a row" in caplog.text
    donor = text(generator, 120)
    cache.donate(donor)
    req = cache.request(donor[20:] + tokens(generator, 40))
    assert cache.match(req) == 0
    assert state_of(req).match.reason == Reason.DISABLED
    assert cache.all_slots_back()


def test_errors_of_the_extend_itself_are_those_of_stock(generator):
    cache = Cache()
    req, _ = admitted(cache, generator)
    with pytest.raises(RuntimeError, match="injected"):
        cache.fuse(req, run=fails)


def test_an_error_after_admission_began_leaks_nothing(generator, monkeypatch):
    for name in ("allocate", "lock_path", "matched_slots", "load_back_result"):
        cache = Cache()
        donor = text(generator, 120)
        cache.donate(donor)
        req = cache.request(donor[20:] + tokens(generator, 40))
        assert cache.match(req) == 100
        with monkeypatch.context() as patch:
            patch.setattr(compat, name, fails_once(getattr(compat, name)))
            if name == "load_back_result":
                with pytest.raises(RuntimeError, match="injected"):
                    cache.load(req)
                cache.tree.after_admission(req, admitted=False)
            else:
                assert cache.load(req) == 0
                assert state_of(req).match.reason == Reason.ERROR
        assert cache.all_slots_back()


def test_options_that_a_front_end_let_through_are_a_full_prefill(generator):
    """Not every front end loads plugins, so unchecked options must not raise in the scheduler."""
    cache = Cache()
    donor = text(generator, 120)
    cache.donate(donor)
    req = cache.request(donor[20:] + tokens(generator, 40), ratio=2)
    assert cache.match(req) == 0
    assert state_of(req).match.reason == Reason.INVALID
    with cache.tree.inserting(req):
        cache.donate(tokens(generator, 40))


def test_an_error_in_the_search_is_a_full_prefill(generator, monkeypatch):
    cache = Cache()
    donor = text(generator, 120)
    cache.donate(donor)

    monkeypatch.setattr(PromptSearch, "spans", fails)
    req = cache.request(donor[20:] + tokens(generator, 40))
    assert cache.match(req) == 0
    assert state_of(req).match.reason == Reason.ERROR
