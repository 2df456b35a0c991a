"""A fused request on the engine, compared with a float64 Llama that reuses the same donor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from a3_sglang.client import flush
from a3_sglang.drift.model import MAX_BLOCK
from a3_sglang.integration.startup import line_ends
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.plan import Plan, make_plan
from a3_sglang.matching.search import find_spans
from a3_sglang.selectors import Budget, ProbeLayers, ReusedRows, pick
from a3_sglang.selectors.probe import Probe
from helpers.drift import drift_correction64
from helpers.reference import Llama, backwards, gaps, reused, rope64
from helpers.tolerance import distance, rope_error, roundings
from helpers.traffic import Traffic

CORRECTED = {"ratio": 0.25}
"""Options with which the drift of the rows that are not recomputed is corrected."""

INDEX_BLOCK = 16
"""Tokens per hash block of the index at the default min_span."""


class Fused:
    """One fused request: the engine's KV, and the oracle's KV of the same donor, moved to its new positions.

    Attributes:
        engine: KV of the engine, ``{"k", "v"}``, each (layers, tokens, kv_heads, head_dim).
        copied: keys and values per layer, float64: of spans as copied, of other tokens as the prompt's own prefill.
        rows: prompt positions that the engine computed: recomputed tokens and gaps, ascending.
    """

    def __init__(self, traffic: Traffic, oracle: Llama, option: dict, documents: int = 4) -> None:
        traffic.renew()
        flush(traffic.running)
        order = list(range(documents))
        donor = traffic.prompt(order)
        traffic.ask(donor, False, tokens=1)
        prompt = traffic.prompt(order[::-1])
        out = traffic.ask(prompt, option, tokens=1)
        self.engine, self.report = traffic.kv(out), out["meta_info"]["a3"]
        self.tokens, self.oracle = torch.tensor(prompt), oracle
        self.plan = self._plan(donor, prompt, line_ends(traffic.running.tokenizer_manager.tokenizer))
        self.reused = reused(self.plan)
        assert self.plan.prefix == self.report["prefix"]
        assert len(self.reused) == self.report["reused"] + self.report["recomputed"]
        self.recomputed = self.engine["recomputed"]
        self.rows = torch.cat([self.recomputed, gaps(self.plan)]).sort().values
        # Spans get the oracle's KV of the donor, rotated to the new positions.
        self.copied = [[layer.clone() for layer in part] for part in oracle.prefill64(self.tokens)[:2]]
        of_donor = oracle.prefill64(torch.tensor(donor))[:2]
        table = oracle.ropes[0].cos_sin.double()
        for span in self.plan.spans:
            new, old = slice(span.start, span.end), slice(span.offset, span.offset + span.length)
            for layer in range(oracle.depth):
                raw = rope64(of_donor[0][layer][old], backwards(table[old]), oracle.neox)
                self.copied[0][layer][new] = rope64(raw, table[new], oracle.neox)
                self.copied[1][layer][new] = of_donor[1][layer][old]

    @staticmethod
    def _plan(donor: list[int], prompt: list[int], ends: Any) -> Plan:
        index = AnyPositionIndex(32, line_ends=ends)
        index.add("", donor)
        prefix = next(i for i, (a, b) in enumerate(zip(donor, prompt, strict=False)) if a != b)
        plan = make_plan(find_spans(index, "", np.array(prompt, np.int32), prefix), prefix, len(prompt), len(prompt), 1)
        assert plan is not None
        return plan

    def error(self, part: int, layer: int, expected: torch.Tensor, rows: torch.Tensor) -> float:
        """Relative distance of the engine's keys (part 0) or values (part 1) from the expected ones."""
        return distance(self.engine["kv"[part]][layer][rows], expected[rows])


def check(traffic: Traffic, oracle: Llama, option: dict, documents: int = 4) -> None:
    """Check copied, rotated, recomputed and corrected KV, layer by layer."""
    fused = Fused(traffic, oracle, option, documents)
    corrected = option == CORRECTED
    correct = drift_correction64(oracle, fused.plan, fused.recomputed, MAX_BLOCK) if corrected else None
    expected = oracle.rows64(fused.tokens, fused.rows, *fused.copied, correct)[:2]
    context = torch.arange(fused.plan.end)
    kept = fused.reused[~torch.isin(fused.reused, fused.recomputed)]
    errors = [
        [fused.error(part, layer, expected[part][layer], context) for layer in range(oracle.depth)] for part in (0, 1)
    ]
    # In deep layers the engine differs from float64 by some tens of roundings.
    assert max(map(max, errors)) < roundings(12) + rope_error(len(fused.tokens))
    if corrected:
        # In the middle layers the correction is larger than the rounding errors, so its absence would show.
        middle = range(oracle.depth // 4, oracle.depth * 4 // 5)
        for part in (0, 1):
            here = [fused.error(part, layer, expected[part][layer], kept) for layer in middle]
            without = [fused.error(part, layer, fused.copied[part][layer], kept) for layer in middle]
            assert sum(without) > 1.5 * sum(here)


def probe_agreement(traffic: Traffic, oracle: Llama, documents: int = 4) -> float:
    """Of the rows that the probe picks by the oracle's attention, the share that the engine recomputed."""
    fused = Fused(traffic, oracle, {"ratio": 0.25}, documents)
    end, total = fused.plan.end, len(fused.tokens)
    keys, values = ([layer.clone() for layer in part] for part in fused.copied)
    unknown = torch.tensor(sorted(set(range(total)) - set(fused.reused.tolist()) - set(range(fused.plan.prefix))))
    for layer in (*keys, *values):
        layer[unknown] = torch.nan
    attention = oracle.question64(fused.plan, fused.tokens, keys, values)
    probe, group = Probe(), oracle.shape.heads // oracle.shape.kv_heads
    score = torch.zeros(end, dtype=torch.float64)
    assert isinstance(probe.needs, ProbeLayers)
    for layer in probe.needs.layers(oracle.windows):
        sizes = values[layer].nan_to_num().norm(dim=-1).repeat_interleave(group, 1)
        score += (attention[layer].pow(2).mean(0).sqrt() * sizes.T[:, :end]).sum(0)
    rows = ReusedRows.of([(span.start, span.end) for span in fused.plan.spans], "cpu")
    budget = Budget.of(probe, fused.plan.ratio(0.25, INDEX_BLOCK), len(fused.reused))
    picked = pick(probe, [probe.score(score, rows)], [rows], [budget])[0]
    return len(set(picked.tolist()) & set(fused.recomputed.tolist())) / len(picked)
