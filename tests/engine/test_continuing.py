"""Approximate KV in the tree: which requests continue it, which never see it, and how many rows they compute."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from a3_sglang.client import flush
from helpers.engines import POOL
from helpers.tolerance import assert_same_prefill
from helpers.traffic import Traffic, answer, parts

pytestmark = [pytest.mark.engine, pytest.mark.core]


def report(out: dict[str, Any]) -> dict[str, Any]:
    return out["meta_info"]["a3"]


@pytest.fixture
def shuffled(traffic: Traffic) -> list[int]:
    """A prompt over cached documents in another order; the cache holds nothing else."""
    flush(traffic.running)
    traffic.renew()
    traffic.ask(traffic.prompt([0, 1, 2, 3]), False)
    return traffic.prompt([3, 1, 0])


def test_a_retry_computes_one_token(traffic, shuffled):
    first = report(traffic.ask(shuffled))
    assert first["reason"] is None
    assert first["continued"] == 0
    again = traffic.ask(shuffled)
    assert report(again)["continued"] == len(shuffled) - 1 - first["prefix"]
    assert report(again)["tail"] == 1
    assert report(again)["reason"] is None
    assert parts(report(again)) == len(shuffled)
    assert again["meta_info"]["cached_tokens"] == len(shuffled) - 1


def test_a_chat_computes_what_is_new(traffic, shuffled):
    prompt, computed = shuffled, []
    for _ in range(4):
        out = traffic.ask(prompt, tokens=12)
        said = report(out)
        assert parts(said) == len(prompt)
        computed.append(said["recomputed"] + said["gap"] + said["tail"])
        assert out["meta_info"]["cached_tokens"] == len(prompt) - computed[-1]
        prompt = [*prompt, *out["output_ids"], *traffic.tokens(30)]
    # An answer's last token has no KV yet, except in releases before 0.5.21.
    assert len(computed) == 4
    assert all(count in (30, 31) for count in computed[1:])


def test_a_new_question_continues_the_context(traffic, shuffled):
    first = report(traffic.ask(shuffled))
    out = traffic.ask(shuffled[:-40] + traffic.tokens(40))
    assert report(out)["prefix"] == first["prefix"]
    assert report(out)["prefix"] + report(out)["continued"] == len(shuffled) - 40
    assert report(out)["tail"] == 40


def test_documents_after_a_continued_prefix_are_reused(traffic, shuffled):
    traffic.ask(shuffled)
    out = traffic.ask([*shuffled, *traffic.documents[2], *traffic.tokens(40)])
    assert report(out)["continued"] > 200
    assert report(out)["reused"] + report(out)["recomputed"] >= len(traffic.documents[2]) - 30


def test_plain_requests_never_see_it(traffic, shuffled):
    """They get the KV, tokens and logprobs of a cache without approximate KV, and leave exact KV."""
    first = report(traffic.ask(shuffled))
    plain = traffic.ask(shuffled, False)
    assert report(plain)["prefix"] == first["prefix"]
    assert report(plain)["continued"] == 0
    assert plain["meta_info"]["cached_tokens"] == first["prefix"]
    flush(traffic.running)
    traffic.ask(traffic.prompt([0, 1, 2, 3]), False)
    alone = traffic.ask(shuffled, False)
    assert answer(plain) == answer(alone)
    for part in "kv":
        assert_same_prefill(traffic.kv(plain)[part], traffic.kv(alone)[part])
    # Exact wins.
    assert report(traffic.ask(shuffled))["prefix"] == len(shuffled) - 1


def test_donors_never_see_it(traffic, shuffled):
    traffic.ask(shuffled)
    donor = report(traffic.ask(shuffled, {"donor": True}))
    assert donor["continued"] == donor["reused"] == donor["recomputed"] == 0


def test_all_recomputed_is_exact(traffic, shuffled):
    """It is a prefix for all requests, and a donor."""
    traffic.ask(shuffled, {"ratio": 1.0})
    assert report(traffic.ask(shuffled, False))["prefix"] == len(shuffled) - 1


@pytest.mark.parametrize("ratio", [0.15, 1.0])
def test_without_keep_a_request_continues_nothing_and_leaves_nothing(traffic, shuffled, ratio):
    first = report(traffic.ask(shuffled, {"ratio": ratio, "keep": False}))
    assert first["reason"] is None
    for _ in range(2):
        assert report(traffic.ask(shuffled, {"ratio": ratio, "keep": False})) == first
    assert report(traffic.ask(shuffled, False))["prefix"] == first["prefix"]


def test_other_ratios_are_not_continued(traffic, shuffled):
    traffic.ask(shuffled, {"ratio": 0.1})
    assert report(traffic.ask(shuffled, {"ratio": 0.5}))["continued"] == 0
    assert report(traffic.ask(shuffled, {"ratio": 0.1}))["continued"] > 200


def test_many_samples_share_one_context(traffic, shuffled):
    """SGLang computes the prompt once and then runs all samples, which share its slots."""
    params = {"temperature": 1.0, "n": 8, "max_new_tokens": 8, "ignore_eos": True}
    outs = traffic.running.generate(input_ids=shuffled, sampling_params=params)
    said = [report(out) for out in outs]
    assert all(one["prefix"] + one["continued"] == len(shuffled) - 1 for one in said)
    assert len({tuple(one.items()) for one in said}) == 1


def test_sixteen_samples_hold_one_context(traffic, shuffled):
    params = {"temperature": 1.0, "n": 16, "max_new_tokens": 32, "ignore_eos": True}
    held: list[int] = []

    async def ask() -> None:
        task = asyncio.ensure_future(traffic.running.async_generate(input_ids=shuffled, sampling_params=params))
        while not task.done():
            loads = await traffic.running.tokenizer_manager.get_loads()
            held.extend(load.num_used_tokens for load in loads)
            await asyncio.sleep(0.005)

    traffic.running.loop.run_until_complete(ask())
    # As in stock SGLang: the prompt once, and the answers.
    stock = len(shuffled) + 16 * 32
    assert len(shuffled) + 16 * 8 < max(held) <= 1.2 * stock


def test_new_text_is_a_donor_from_its_second_prompt_on(traffic, shuffled):
    new = traffic.documents[5]
    prompt = [*shuffled[:-40], *new, *traffic.documents[2], *traffic.tokens(40)]
    first = report(traffic.ask(prompt))
    assert first["gap"] >= len(new)
    again = report(traffic.ask([*traffic.system, *traffic.documents[1], *new, *traffic.tokens(40)]))
    assert again["reused"] + again["recomputed"] >= len(new) + len(traffic.documents[1]) - 60


def test_a_flush_forgets_it(traffic, shuffled):
    traffic.ask(shuffled)
    flush(traffic.running)
    out = report(traffic.ask(shuffled))
    assert out["prefix"] == out["continued"] == out["reused"] == out["recomputed"] == 0


def test_tenants_do_not_share_it(traffic, shuffled):
    traffic.ask(shuffled)
    out = report(traffic.ask(shuffled, extra_key="another"))
    assert out["prefix"] == out["continued"] == 0


def test_it_is_evicted_like_other_kv(traffic, shuffled):
    """After twice the pool's size of other prompts, it is fused again or computed in full, and no slot is lost."""
    traffic.ask(shuffled)
    for _ in range(2 * POOL["max_total_tokens"] // 1000):
        traffic.ask(traffic.tokens(1000), False, tokens=1)
    assert report(traffic.ask(shuffled))["continued"] == 0
    flush(traffic.running)
