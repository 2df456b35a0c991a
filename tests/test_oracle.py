"""The engine's fused KV against a Llama written here, with the same real weights, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Llama, backwards, gaps, reused, rope64, spread64
from traffic import Traffic

from a3_sglang.cache.index import AnyPositionIndex
from a3_sglang.cli.common import flush
from a3_sglang.drift import BLOCK
from a3_sglang.fusion.executor import QUESTION_TOKENS
from a3_sglang.fusion.plan import Plan, make_plan
from a3_sglang.selectors import Probe, Rows

pytestmark = [pytest.mark.engine, pytest.mark.core]

BF16 = 2.0**-8
"""Relative rounding of one bf16 number; a deep layer of the engine is some tens of roundings away from float64."""


class Fused:
    """One fused request: the engine's KV, and what the oracle makes of the same donor and rows."""

    def __init__(self, traffic: Traffic, oracle: Llama, option: dict) -> None:
        traffic.renew()
        flush(traffic.running)
        donor = traffic.prompt([1, 4, 6, 2])
        traffic.ask(donor, False, tokens=1)
        prompt = traffic.prompt([6, 1, 2, 4])
        out = traffic.ask(prompt, option, tokens=1)
        self.engine, self.report = traffic.kv(out), out["meta_info"]["a3"]
        self.tokens, self.oracle = torch.tensor(prompt), oracle
        self.plan = self._plan(donor, prompt)
        self.reused = reused(self.plan)
        assert self.plan.prefix == self.report["prefix"]
        assert len(self.reused) == self.report["reused"] + self.report["recomputed"]
        self.recomputed = self.engine["recomputed"]
        self.rows = torch.cat([self.recomputed, gaps(self.plan)]).sort().values
        # The oracle's own KV of the donor, moved; of the prefix it is the prompt's own.
        self.exact = oracle.prefill64(self.tokens)[:2]
        of_donor = oracle.prefill64(torch.tensor(donor))[:2]
        self.copied = [[layer.clone() for layer in part] for part in self.exact]
        table = oracle.ropes[0].cos_sin.double()
        for span in self.plan.spans:
            new, old = slice(span.start, span.end), slice(span.offset, span.offset + span.length)
            for layer in range(oracle.depth):
                raw = rope64(of_donor[0][layer][old], backwards(table[old]), oracle.neox)
                self.copied[0][layer][new] = rope64(raw, table[new], oracle.neox)
                self.copied[1][layer][new] = of_donor[1][layer][old]

    @staticmethod
    def _plan(donor: list[int], prompt: list[int]) -> Plan:
        index = AnyPositionIndex(32)
        index.add("", donor)
        prefix = next(i for i, (a, b) in enumerate(zip(donor, prompt, strict=False)) if a != b)
        plan = make_plan(index.find("", np.array(prompt, np.int32), prefix), prefix, len(prompt), len(prompt), 1)
        assert plan is not None
        return plan

    def error(self, part: int, layer: int, expected: torch.Tensor, rows: torch.Tensor) -> float:
        """Relative distance of the engine's keys (0) or values (1) from what is expected."""
        found, wanted = self.engine["kv"[part]][layer][rows].double(), expected[rows]
        return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def oracle(model: str) -> Llama:
    return Llama.load(Path(model))


@pytest.mark.parametrize("option", [{"ratio": 1.0}, {"ratio": 0.25}, {"selector": "reuse"}, {"selector": "epic"}])
def test_fused_kv_is_the_oracles(traffic: Traffic, oracle: Llama, option: dict):
    """Copied, rotated, recomputed and corrected KV, layer by layer."""
    fused = Fused(traffic, oracle, option)
    spread = option == {"ratio": 0.25}
    correct = spread64(oracle, fused.plan, fused.recomputed, BLOCK) if spread else None
    expected = oracle.rows64(fused.tokens, fused.rows, *fused.copied, correct)[:2]
    context = torch.arange(fused.plan.end)
    kept = fused.reused[~torch.isin(fused.reused, fused.recomputed)]
    errors = [
        [fused.error(part, layer, expected[part][layer], context) for layer in range(oracle.depth)] for part in (0, 1)
    ]
    assert max(map(max, errors)) < 12 * BF16
    if spread:
        # In the middle of the model the correction is larger than rounding, so that its absence would show.
        for part in (0, 1):
            here = [fused.error(part, layer, expected[part][layer], kept) for layer in range(8, 24)]
            without = [fused.error(part, layer, fused.copied[part][layer], kept) for layer in range(8, 24)]
            assert sum(without) > 1.5 * sum(here)


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
    picked = probe.pick(score, rows, probe.budget(0.25, len(fused.reused)))
    common = len(set(picked.tolist()) & set(fused.recomputed.tolist())) / len(picked)
    # Rows near the threshold change places by rounding.
    assert common > 0.9
