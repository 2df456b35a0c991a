"""The engine's fused KV against a Llama written here, with the same weights, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import SPREAD, Fused, check
from reference import Llama
from traffic import Traffic

from a3_sglang.fusion.executor import QUESTION_TOKENS
from a3_sglang.selectors import Probe, Rows

BLOCK = 16
"""Tokens per block of the index at the default min_span."""

pytestmark = [pytest.mark.engine, pytest.mark.core]


@pytest.fixture(scope="module")
def oracle(tiny: str) -> Llama:
    return Llama.load(Path(tiny))


@pytest.mark.parametrize("option", [{"ratio": 1.0}, SPREAD, {"selector": "reuse"}, {"selector": "epic"}])
def test_fused_kv_is_the_oracles(traffic: Traffic, oracle: Llama, option: dict):
    check(traffic, oracle, option)


def test_the_probe_picks_the_oracles_rows(traffic: Traffic, oracle: Llama):
    fused = Fused(traffic, oracle, {"ratio": 0.25})
    end, total = fused.plan.end, len(fused.tokens)
    question = torch.arange(max(end, total - QUESTION_TOKENS), total)
    keys, values = ([layer.clone() for layer in part] for part in fused.copied)
    unknown = torch.tensor(sorted(set(range(total)) - set(fused.reused.tolist()) - set(range(fused.plan.prefix))))
    for layer in (*keys, *values):
        layer[unknown] = torch.nan
    attention = oracle.rows64(fused.tokens, question, keys, values)[3]
    probe, group = Probe(), oracle.shape.heads // oracle.shape.kv_heads
    score = torch.zeros(end, dtype=torch.float64)
    for layer in probe.probe_layers(oracle.depth):
        sizes = values[layer].nan_to_num().norm(dim=-1).repeat_interleave(group, 1)
        score += (attention[layer].pow(2).mean(0).sqrt() * sizes.T).sum(0)[:end]
    rows = Rows.of([(span.start, span.end) for span in fused.plan.spans], "cpu")
    picked = probe.pick(score, rows, probe.budget(fused.plan.ratio(0.25, BLOCK), len(fused.reused)))
    common = len(set(picked.tolist()) & set(fused.recomputed.tolist())) / len(picked)
    # Rows near the threshold change places by rounding, on a random model more than on a trained one.
    assert common > 0.8
