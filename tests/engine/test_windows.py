"""A trained model with sliding windows in most layers, on the engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from a3_sglang.client import flush
from a3_sglang.evaluation.prompts import Writer
from a3_sglang.evaluation.questions import make
from helpers.engines import Engines
from helpers.tolerance import assert_same_prefill, distance
from helpers.traffic import Traffic, answer, parts

pytestmark = [pytest.mark.engine, pytest.mark.core]

WINDOW = 512
GLOBAL_LAYERS = (5, 11, 17)


@pytest.fixture(scope="module")
def traffic(engines: Engines, gemma: str) -> Iterator[Traffic]:
    running, folder = engines.get(gemma, "a3", max_total_tokens=12288, chunked_prefill_size=4096)
    yield Traffic(running, random.randrange(2**32), folder)
    flush(running)


@pytest.fixture
def case(gemma: str) -> tuple[list[int], list[int], list[int]]:
    """A prompt with a number planted in one of its passages, the earlier prompt that left them, and the number."""
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    questions = make("fact", 2, 5, 20, random.randrange(2**32))
    writer = Writer(tokenizer, 5, 350, 0)
    case = writer.case(questions, 0)
    assert case.prompt[0] == tokenizer.bos_token_id
    return case.prompt, case.donors["harvest"][0], writer.ids(questions[0].answers[0])


def ask(traffic: Traffic, prompt: list[int], donor: list[int], a3: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    flush(traffic.running)
    traffic.ask(donor, False)
    out = traffic.ask(prompt, a3)
    report = out["meta_info"]["a3"]
    assert report["reason"] is None
    assert parts(report) == len(prompt)
    assert len(prompt) - report["tail"] > 2 * WINDOW
    return out, report


def test_ratio_one_is_a_full_prefill(traffic: Traffic, case: tuple[list[int], list[int], list[int]]) -> None:
    prompt, donor, _ = case
    fused, report = ask(traffic, prompt, donor, {"ratio": 1.0, "keep": False})
    assert report["reused"] == 0
    assert report["recomputed"] > WINDOW
    full = traffic.ask(prompt, False)
    assert answer(fused)[0] == answer(full)[0]
    end = len(prompt) - report["tail"]
    mine, theirs = traffic.kv(fused), traffic.kv(full)
    for part in "kv":
        assert_same_prefill(mine[part][:, :end], theirs[part][:, :end])


def test_a_planted_number_is_found_and_kv_is_closer_than_what_was_copied(
    traffic: Traffic, case: tuple[list[int], list[int], list[int]]
) -> None:
    prompt, donor, number = case
    flush(traffic.running)
    full = traffic.ask(prompt, False, tokens=12)
    theirs, errors = traffic.kv(full), []
    for options in ({"selector": "reuse"}, {"ratio": 0.15}):
        fused, report = ask(traffic, prompt, donor, options)
        assert report["reused"] > 1000
        mine, end = traffic.kv(fused), len(prompt) - report["tail"]
        # Layer 0 has attended to no context.
        assert distance(mine["v"][0, :end], theirs["v"][0, :end]) < torch.finfo(mine["v"].dtype).eps
        errors.append([distance(mine["v"][layer, :end], theirs["v"][layer, :end]) for layer in GLOBAL_LAYERS])
    assert all(after < before for before, after in zip(*errors, strict=True))
    fused = ask(traffic, prompt, donor, {"ratio": 0.15})[0]
    found = fused["output_ids"][: len(number)] == number
    assert found or full["output_ids"][: len(number)] != number
