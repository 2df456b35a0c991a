"""The invariants of docs/architecture.md, by their numbers, on a real engine."""

from __future__ import annotations

import random
import time

import pytest
import torch

from a3_sglang.client import flush
from helpers.engines import POOL, Engines
from helpers.tolerance import DTYPE, assert_same_prefill, distance, rope_error, roundings
from helpers.traffic import Traffic, answer, parts

pytestmark = [pytest.mark.engine, pytest.mark.core]


@pytest.fixture(scope="module")
def stock(engines: Engines, tiny: str) -> list:
    """Prompts and their answers on a stock engine, which stops before the other engine starts."""
    running, _ = engines.get(tiny, None)
    source = Traffic(running, seed=5)
    prompts = [source.prompt() for _ in range(10)]
    # A stock engine does not know this option. The prompt shares no prefix with the other ones.
    source.ask(source.tokens(60), {"ratio": "nonsense"})
    # Twice: once computed in full, once after a cached prefix.
    return [(ids, source.ask(ids), source.ask(ids)) for ids in prompts]


def test_stock_engine_is_untouched(stock):
    """1: without the option SGLang is unchanged: no report, and ``custom_params["a3"]`` is ignored."""
    for _, first, _ in stock:
        assert "a3" not in first["meta_info"]


def test_plain_answers_are_stock_answers_among_fused_ones(stock, traffic):
    """3: the same tokens and logprobs before, during and after fused traffic."""
    flush(traffic.running)
    for i, (ids, first, again) in enumerate(stock):
        assert answer(traffic.ask(ids, False)) == answer(first)
        if i % 2:
            traffic.ask(traffic.prompt(), False)
            beside_fused(traffic)
            assert answer(traffic.ask(ids, False)) == answer(first)
        assert answer(traffic.ask(ids, False))[0] == answer(again)[0]


def beside_fused(traffic):
    """A plain request has the same KV alone and in a batch with fused ones, up to rounding by batch size."""
    plain = traffic.tokens(300)
    outs = traffic.running.generate(
        input_ids=[traffic.prompt(), traffic.prompt(), plain],
        sampling_params=[
            {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True, "custom_params": {"a3": option}}
            for option in ({"ratio": 0.3}, True, False)
        ],
    )
    assert outs[2]["meta_info"]["a3"]["reason"] == "off"
    during = traffic.kv(outs[2])
    flush(traffic.running)
    alone = traffic.kv(traffic.ask(plain, False))
    for part in ("k", "v"):
        assert distance(during[part], alone[part]) < roundings(5)


def test_ratio_one_is_a_full_prefill(traffic):
    """4: same greedy tokens, logprobs and KV on 20 random multi-chunk prompts, gaps included."""
    gaps = 0
    for _ in range(20):
        flush(traffic.running)
        traffic.renew()
        traffic.ask(traffic.prompt(list(range(8))), False)
        ids = traffic.prompt(random.sample(range(7, -1, -1), 5))
        # A passage that is not cached, before the last one.
        at = len(ids) - 110
        ids[at:at] = traffic.tokens(random.randrange(1, 60))
        fused = traffic.ask(ids, {"ratio": 1.0, "keep": False})
        report = fused["meta_info"]["a3"]
        gaps += report["gap"]
        assert report["reason"] is None
        assert report["reused"] == 0
        assert report["recomputed"] > 64
        assert report["charged"] == 1.0
        assert parts(report) == len(ids)
        full = traffic.ask(ids, False)
        assert full["meta_info"]["a3"]["prefix"] == report["prefix"]
        (tokens, logprobs), (expected, expected_logprobs) = answer(fused), answer(full)
        assert tokens == expected
        # In float32 even two full prefills may differ by the order of their sums.
        assert logprobs == pytest.approx(expected_logprobs, rel=0, abs=1e-4 if DTYPE is torch.float32 else 0)
        mine, theirs = traffic.kv(fused), traffic.kv(full)
        end = len(ids) - report["tail"]
        for part in ("k", "v"):
            assert_same_prefill(mine[part][:, :end], theirs[part][:, :end])
    assert gaps > 0


def test_moved_spans_have_fresh_layer_zero_kv(traffic):
    """5: KV of layer 0 depends only on token and position."""
    flush(traffic.running)
    traffic.renew()
    traffic.ask(traffic.prompt([0, 1, 2, 3, 4, 5]), False)
    ids = traffic.prompt([4, 2, 0, 5])
    fused = traffic.ask(ids, {"selector": "reuse"})
    report = fused["meta_info"]["a3"]
    assert report["reused"] > 64
    assert report["recomputed"] == 0
    mine, theirs = traffic.kv(fused), traffic.kv(traffic.ask(ids, False))
    end = len(ids) - report["tail"]
    assert torch.equal(mine["v"][0, :end], theirs["v"][0, :end])
    error = (mine["k"][0, :end].float() - theirs["k"][0, :end].float()).norm(dim=-1)
    assert (error <= (roundings(8) + rope_error(end)) * theirs["k"][0, :end].float().norm(dim=-1)).all()
    # Deeper layers differ, so the comparison above can fail.
    assert distance(mine["v"][5, :end], theirs["v"][5, :end]) > 0.05


def test_exact_prefix_wins(traffic):
    """2 and 5: a cached prefix is used as such, even if donors hold the same text elsewhere."""
    flush(traffic.running)
    traffic.renew()
    traffic.ask(traffic.prompt([3, 2, 1, 0]), False)
    first = traffic.prompt([0, 1, 2, 3])
    traffic.ask(first, False)
    out = traffic.ask(first[:-40] + traffic.tokens(40))
    report = out["meta_info"]["a3"]
    assert report["prefix"] == len(first) - 40
    assert report["reused"] == report["recomputed"] == 0


def test_namespaces_do_not_mix(traffic):
    """6: a tenant's chunks are not donors for other tenants."""
    flush(traffic.running)
    traffic.renew()
    traffic.ask(traffic.prompt([0, 1, 2, 3]), False, extra_key="one")
    for key in ("two", None):
        report = traffic.ask(traffic.prompt([3, 1, 0, 2]), True, extra_key=key)["meta_info"]["a3"]
        assert report["prefix"] == report["reused"] == report["recomputed"] == 0
        flush(traffic.running)
        traffic.ask(traffic.prompt([0, 1, 2, 3]), False, extra_key="one")
    report = traffic.ask(traffic.prompt([3, 1, 0, 2]), True, extra_key="one")["meta_info"]["a3"]
    assert report["reused"] + report["recomputed"] > 64


def test_picked_rows_do_not_depend_on_the_batch(traffic):
    """A prompt has the same KV alone and in a batch."""
    flush(traffic.running)
    traffic.renew()
    traffic.ask(traffic.prompt(list(range(8))), False)
    ids = traffic.prompt([5, 3, 1, 6])
    alone = traffic.ask(ids, {"ratio": 0.2, "keep": False})
    others = [traffic.prompt() for _ in range(3)]
    params = {
        "temperature": 0,
        "max_new_tokens": 6,
        "ignore_eos": True,
        "custom_params": {"a3": {"ratio": 0.2, "keep": False}},
    }
    outs = traffic.running.generate(input_ids=[*others, ids], sampling_params=params)
    mine, theirs = traffic.kv(alone), traffic.kv(outs[3])
    assert outs[3]["meta_info"]["a3"] == alone["meta_info"]["a3"]
    end = len(ids) - 40
    for part in ("k", "v"):
        assert distance(mine[part][:, :end], theirs[part][:, :end]) < roundings(5)


def test_bad_options_name_the_field_and_lose_nothing(traffic):
    ids = traffic.prompt()
    for bad, field in [
        ({"ratio": 2}, "custom_params.a3.ratio"),
        ({"ratio": "much"}, "custom_params.a3.ratio"),
        ({"selector": "best"}, "custom_params.a3.selector"),
        ({"min_span": 4}, "custom_params.a3.min_span"),
        ({"rato": 0.1}, "custom_params.a3.rato"),
        ("yes", "custom_params.a3"),
    ]:
        with pytest.raises(ValueError, match=field.replace(".", r"\.")):
            traffic.ask(ids, bad)
    assert traffic.ask(ids, False)["meta_info"]["a3"]["reason"] == "off"


def test_parallel_samples_and_streaming(traffic):
    flush(traffic.running)
    traffic.renew()
    traffic.ask(traffic.prompt([0, 1, 2, 3]), False)
    ids = traffic.prompt([2, 0, 3])
    params = {"temperature": 0.8, "n": 3, "max_new_tokens": 5, "ignore_eos": True}
    outs = traffic.running.generate(input_ids=ids, sampling_params=params)
    assert len(outs) == 3
    assert all(parts(out["meta_info"]["a3"]) == len(ids) for out in outs)
    flush(traffic.running)
    traffic.ask(traffic.prompt([0, 1, 2, 3]), False)
    whole = traffic.ask(ids, {"ratio": 0.2})
    flush(traffic.running)
    traffic.ask(traffic.prompt([0, 1, 2, 3]), False)
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True, "custom_params": {"a3": {"ratio": 0.2}}}
    pieces = list(traffic.running.generate(input_ids=ids, sampling_params=params, stream=True))
    assert pieces[-1]["meta_info"]["a3"] == whole["meta_info"]["a3"]
    assert pieces[0]["meta_info"]["a3"] == whole["meta_info"]["a3"]


def test_all_slots_come_back(traffic):
    """7: SGLang refuses to flush while a slot is in use, and checks for leaks when idle."""
    flush(traffic.running)
    time.sleep(1.5)
    usage = traffic.running.get_server_info()["internal_states"][0]
    assert usage["memory_usage"]["token_capacity"] == POOL["max_total_tokens"]
    assert traffic.ask(traffic.prompt(), False)["meta_info"]["cached_tokens"] == 0
