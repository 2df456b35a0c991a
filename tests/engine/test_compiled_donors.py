"""Compiled donors on the real engine: an answer does not depend on earlier requests."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from a3_sglang.client import flush
from helpers.engines import Engines
from helpers.tolerance import distance, roundings
from helpers.traffic import Traffic, answer

pytestmark = [pytest.mark.engine, pytest.mark.core]

OPTIONS = {"A3_DONORS": "compiled"}
ORDER = [2, 5, 0, 7]


def compile_documents(traffic: Traffic) -> list[dict[str, Any]]:
    donors = [traffic.system + document for document in traffic.documents]
    return [traffic.ask(ids, {"donor": True}, tokens=1)["meta_info"]["a3"] for ids in donors]


def test_own_turns_continue_and_other_questions_do_not(traffic: Traffic):
    """An answer depends on earlier turns of the same conversation, but not on other questions about the same text."""
    traffic.renew()
    flush(traffic.running)
    compile_documents(traffic)
    prompt = traffic.prompt(ORDER)
    out = traffic.ask(prompt)
    other = traffic.ask(prompt[:-40] + traffic.tokens(40))["meta_info"]["a3"]
    assert other["continued"] == 0
    assert other["reused"] > 0
    turn = [*prompt, *out["output_ids"], *traffic.tokens(40)]
    report = traffic.ask(turn)["meta_info"]["a3"]
    # Releases before 0.5.21 also cache KV of an answer's last token.
    assert len(prompt) + len(out["output_ids"]) - (report["prefix"] + report["continued"]) in (0, 1)
    assert report["reused"] == 0


def strip(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report[name] for name in ("prefix", "reused", "recomputed", "gap", "tail", "reason")}


def test_answers_do_not_depend_on_other_traffic(traffic: Traffic):
    traffic.renew()
    flush(traffic.running)
    question = traffic.tokens(40)
    prompt = traffic.prompt(ORDER, 0) + question
    reports = compile_documents(traffic)
    assert all("donor" in report["reason"].lower() and report["reused"] == 0 for report in reports)
    first = traffic.ask(prompt)
    report = first["meta_info"]["a3"]
    assert report["reason"] is None
    assert report["reused"] > report["recomputed"] > 0
    # Traffic that leaves other KV of the same chunks, and exact prefixes of the same prompt.
    for order in ([5, 0, 2, 7], [7, 2, 5, 0], [2, 5, 1, 3], ORDER[:2], ORDER):
        traffic.ask(traffic.prompt(order), False, tokens=2)
        traffic.ask(traffic.prompt(order), None, tokens=2)
    plain = traffic.ask(prompt + traffic.tokens(30), False, tokens=2)["meta_info"]
    assert plain["a3"]["prefix"] > len(traffic.system) + 40
    again = traffic.ask(prompt)
    assert strip(again["meta_info"]["a3"]) == strip(report)
    assert answer(again) == answer(first)
    assert all((traffic.kv(again)[part] == traffic.kv(first)[part]).all() for part in "kv")


def test_only_donors_are_reused(traffic: Traffic):
    traffic.renew()
    flush(traffic.running)
    traffic.ask(traffic.prompt(ORDER), False)
    report = traffic.ask(traffic.prompt(ORDER[::-1]))["meta_info"]["a3"]
    assert report["reused"] + report["recomputed"] == 0
    assert report["reason"] is not None


def test_the_answer_to_a_donor_is_not_a_donor(traffic: Traffic):
    traffic.renew()
    flush(traffic.running)
    donor = traffic.system + traffic.tokens(120)
    said = traffic.ask(donor, {"donor": True}, tokens=90)["output_ids"]
    report = traffic.ask(traffic.tokens(40) + donor[len(traffic.system) :] + said + traffic.tokens(40))["meta_info"][
        "a3"
    ]
    assert 0 < report["reused"] + report["recomputed"] <= 120


def test_a_fresh_engine_with_other_traffic_has_the_same_kv(traffic: Traffic):
    """Up to rounding: the request that comes first decides in which batch the KV of the system part is computed."""
    traffic.renew()
    question = traffic.tokens(40)
    prompt = traffic.prompt(ORDER, 0) + question
    seen = []
    for before in ([[1, 2, 3]], [[7, 6], ORDER]):
        flush(traffic.running)
        for order in before:
            traffic.ask(traffic.prompt(order), False)
        compile_documents(traffic)
        out = traffic.ask(prompt)
        seen.append((strip(out["meta_info"]["a3"]), traffic.kv(out)))
    (one_report, one), (other_report, other) = seen
    assert one_report == other_report
    chosen = [set(kv["recomputed"].tolist()) for kv in (one, other)]
    # Rows with nearly equal scores may swap; then the rows around them differ a little, too.
    assert len(chosen[0] & chosen[1]) >= 0.75 * len(chosen[0])
    same = [at for at in range(one["k"].shape[1]) if at not in chosen[0] ^ chosen[1]]
    for part in "kv":
        bound = roundings(8) if chosen[0] == chosen[1] else 0.1
        assert distance(other[part][:, same], one[part][:, same]) < bound


def test_steps_do_not_depend_on_other_traffic(engines: Engines, tiny: str):
    """A prompt of several chunks, with new text longer than a chunk; other requests use rows of its chunks."""
    running, folder = engines.get(tiny, "a3", OPTIONS, chunked_prefill_size=256)
    traffic = Traffic(running, seed=random.randrange(1 << 30), folder=folder)
    compile_documents(traffic)
    ids = traffic.prompt([2, 5, 0], question=400)
    ids += [token for i in (7, 1, 3) for token in traffic.documents[i]] + traffic.tokens(40)
    params = {"temperature": 0, "max_new_tokens": 1, "custom_params": {"a3": {"ratio": 0.6, "keep": False}}}

    async def ask(delay: float, ids: list[int]) -> dict[str, Any]:
        await asyncio.sleep(delay)
        return (await running.async_generate(input_ids=ids, sampling_params=params))["meta_info"]["a3"]

    async def among_others() -> dict[str, Any]:
        others = [ask(0.05 * i, traffic.tokens(traffic.random.randrange(30, 200))) for i in range(8)]
        return (await asyncio.gather(ask(0.1, ids), *others))[0]

    alone = running.loop.run_until_complete(ask(0, ids))
    assert alone["reason"] is None
    assert alone["recomputed"] > 256
    assert alone["reused"] + alone["recomputed"] > 350
    for _ in range(5):
        assert running.loop.run_until_complete(among_others()) == alone
