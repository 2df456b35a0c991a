"""Forward passes over some rows of the model: recompute, probe, first layers in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from a3_sglang.attention.probe_attention import ProbeFn, ProbeRows
from a3_sglang.attention.row_attention import Attention, RequestRows
from a3_sglang.drift.correction import DriftCorrection
from a3_sglang.fusion.interface import AttentionHook, Model, StopForward
from a3_sglang.fusion.ops import Ops
from a3_sglang.fusion.request import FusionRequest, rows_of
from a3_sglang.matching.plan import question_ranges
from a3_sglang.selectors import FreshLayer


class RecomputePass(AttentionHook):
    """Rows whose KV is written to their slots before they attend.

    Args:
        slots: int64 (rows,), where the rows' KV goes.
        groups: who owns which rows.
        spreads: what is done before, while the slots still hold the copied KV.
        kv_only: groups at the beginning of which nothing but the KV is wanted. In the last layer only the rows of the
            others attend; where there are none, the pass ends there.
    """

    def __init__(
        self,
        model: Model,
        ops: Ops,
        slots: torch.Tensor,
        groups: Sequence[RequestRows],
        spreads: Sequence[DriftCorrection] = (),
        kv_only: int = 0,
    ) -> None:
        self._model, self._device = model, ops
        self._slots, self._groups, self._spreads, self._kv_only = slots, groups, spreads, kv_only
        self._run: Attention | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        keys, values = self._model.keys[layer], self._model.values[layer]
        if layer:  # KV of layer 0 has seen no context, so it has no drift.
            for spread in self._spreads:
                self._device.spread((keys, values), (key, value), spread, self._model.ropes[layer])
        keys.index_copy_(0, self._slots, key.to(keys.dtype))
        values.index_copy_(0, self._slots, value.to(values.dtype))
        if layer == self._model.depth - 1 and self._kv_only:
            return self._attend_last(query, keys, values, scaling)
        if self._run is None:
            self._run = self._plan(self._groups, query, keys)
        return self._run(query, keys, values, scaling)

    def _attend_last(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        others = self._groups[self._kv_only :]
        if not others:
            raise StopForward
        first = others[0].begin
        moved = [replace(group, begin=group.begin - first, end=group.end - first) for group in others]
        out = torch.zeros_like(query)
        out[first:] = self._plan(moved, query, keys)(query[first:], keys, values, scaling)
        return out

    def _plan(self, groups: Sequence[RequestRows], query: torch.Tensor, keys: torch.Tensor) -> Attention:
        return self._device.rows.plan(groups, query.shape[1], keys.shape[1], query.dtype)


class ProbePass(AttentionHook):
    """The questions of some jobs over their prefixes and spans as they were copied.

    Wherever a question is in its prompt, its rows get the prompt's last positions, after all known context. They do
    not attend to the rest of gaps and tail, get no slots and write no KV. The pass ends after the last layer whose
    scores are wanted.
    """

    def __init__(self, model: Model, ops: Ops, jobs: Sequence[FusionRequest], layers: range) -> None:
        self._model, self._device = model, ops
        self._jobs, self._layers = jobs, layers
        self._known, self._questions, tokens, positions, begin = [], [], [], [], 0
        for job in jobs:
            device, end = job.slots.device, len(job.tokens)
            asked = [job.tokens[start:stop] for start, stop in question_ranges(job.plan, end, job.question)]
            rows = sum(map(len, asked))
            job.probed_rows, job.probed_layers = rows, layers.stop
            known = torch.cat([torch.arange(job.plan.prefix, device=device), rows_of(job.plan, device).positions])
            self._known.append(known)
            self._questions.append(ProbeRows(begin, begin + rows, job.slots[known]))
            tokens += asked
            positions.append(torch.arange(end - rows, end, device=device))
            begin += rows
        self.tokens = torch.cat(tokens)
        self.positions = torch.cat(positions)
        self._scores = torch.zeros(sum(map(len, self._known)), device=self.positions.device)
        self._ask: ProbeFn | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        if self._ask is None:
            self._ask = self._device.questions.plan(self._questions, query.shape[1], key.shape[1])
        pools = self._model.keys[layer], self._model.values[layer]
        out = self._ask(query, (key, value), pools, scaling, self._scores if layer in self._layers else None)
        if layer == self._layers[-1]:
            raise StopForward
        return out

    def by_job(self) -> list[torch.Tensor]:
        """Scores of each job's positions before its tail, float32 (end,); zero where nothing was known."""
        parts = self._scores.split([len(known) for known in self._known])
        return [
            part.new_zeros(job.plan.end).index_copy_(0, known, part)
            for job, known, part in zip(self._jobs, self._known, parts, strict=True)
        ]


class DenseLayersPass(AttentionHook):
    """All rows behind one job's exact prefix, in slices by position; the context's KV goes to its slots."""

    def __init__(self, model: Model, ops: Ops, job: FusionRequest) -> None:
        self._model, self._attention, self._job = model, ops.rows, job
        self._last = job.selector.fresh_layers - 1
        self._copied = self._model.values[self._last].index_select(0, job.slots[job.plan.prefix :])
        self._tail: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._queries: list[torch.Tensor] = []
        self._at = job.plan.prefix

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        job, end = self._job, self._at + len(query)
        context = max(min(job.plan.end - self._at, len(query)), 0)
        pools = self._model.keys[layer], self._model.values[layer]
        for pool, own in zip(pools, (key, value), strict=True):
            pool.index_copy_(0, job.slots[self._at : self._at + context], own[:context].to(pool.dtype))
        tail = self._tail.setdefault(layer, [])
        tail.append((key[context:], value[context:]))
        if layer == self._last:
            self._queries.append(query[context:])
            self._at = end
            raise StopForward
        keys, values = (
            torch.cat([pool[job.slots], *parts]) for pool, parts in zip(pools, zip(*tail, strict=True), strict=True)
        )
        visible = torch.arange(self._at, end, device=query.device) + 1
        group = RequestRows(0, len(query), torch.arange(len(keys), device=query.device), visible, True)
        run = self._attention.plan([group], query.shape[1], key.shape[1], query.dtype)
        return run(query, keys, values, scaling)

    def scores(self) -> torch.Tensor:
        """What the selector measures, float32 (end,); zero where nothing is reused."""
        job, layer = self._job, self._last
        own = slice(job.plan.prefix, None)
        key, value = (
            torch.cat([pool[layer][job.slots[own]], *parts])
            for pool, parts in zip(
                (self._model.keys, self._model.values), zip(*self._tail[layer], strict=True), strict=True
            )
        )
        measured = job.selector.measure(FreshLayer(torch.cat(self._queries), key, value, self._copied))
        scores = torch.zeros(job.plan.end, device=job.slots.device)
        reused = rows_of(job.plan, job.slots.device).positions
        scores[reused] = measured[reused - job.plan.prefix]
        return scores
