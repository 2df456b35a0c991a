"""The fused prefill of a batch of planned requests: copy, probe, select, recompute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from a3_sglang.attention.row_attention import RequestRows
from a3_sglang.drift.correction import DriftCorrection
from a3_sglang.drift.model import DriftPredictor, PaddedBlocks, candidates_per_block
from a3_sglang.fusion.interface import Model
from a3_sglang.fusion.ops import Ops
from a3_sglang.fusion.passes import DenseLayersPass, ProbePass, RecomputePass
from a3_sglang.fusion.request import FusionRequest, Position, Slice, rows_of
from a3_sglang.timing import Timings

SLICE_ROWS = 8192
"""Rows that go through the model at once, at most, where nothing else is said."""


class Executor:
    """Runs jobs on a model.

    Args:
        model: see :class:`Model`.
        device: how it runs where the model's KV lies.
        slice_rows: rows that go through the model at once, at most.
    """

    def __init__(self, model: Model, device: Ops, slice_rows: int = SLICE_ROWS) -> None:
        self.model = model
        self.device = device
        self.slice_rows = slice_rows
        layers: dict[int, list[int]] = {}
        for layer in range(model.depth):
            layers.setdefault(id(model.ropes[layer]), []).append(layer)
        self._pools = [
            (model.ropes[same[0]], device.pools([model.keys[i] for i in same], [model.values[i] for i in same]))
            for same in layers.values()
        ]

    def copy(self, source: torch.Tensor, target: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        """Copy KV rows between slots in all layers, keys turned from their old to their new positions.

        Args:
            source: int64 (n,), slots to copy from.
            target: int64 (n,), slots to copy to; none of ``source``.
            old: int64 (n,), positions of the keys in ``source``.
            new: int64 (n,), positions they are turned to.
        """
        for rope, pools in self._pools:
            self.device.copy(pools, source, target, rope.turn(old, new), rope.neox)

    def fill(self, job: FusionRequest, sources: torch.Tensor) -> None:
        """Copy a job's spans to their places.

        Args:
            job: whose slots are written.
            sources: int64 (plan.reused,), the donors' slots, span after span.
        """
        device, spans = sources.device, job.plan.spans
        old = torch.cat([torch.arange(s.offset, s.offset + s.length, device=device) for s in spans])
        new = rows_of(job.plan, device).positions
        self.copy(sources, job.slots[new], old, new)

    def run(self, jobs: Sequence[FusionRequest], timings: Timings) -> None:
        """Make the KV between each job's prefix and tail ready, in place."""
        self.prepare(jobs, timings, self.slice_rows)

    def prepare(self, jobs: Sequence[FusionRequest], timings: Timings, behind: int) -> list[Slice]:
        """Choose what is recomputed, and recompute what the forward of the tails cannot take along.

        Args:
            jobs: of one batch.
            timings: are added to.
            behind: rows that the forward of the tails has of its own. With what is left for it they are
                ``slice_rows`` at most.

        Returns:
            What is left to recompute, for :meth:`extended`; none where nothing is.
        """
        self.choose(jobs, timings)
        return self.recompute(jobs, timings, behind)

    def recompute_all(self, job: FusionRequest) -> None:
        """Recompute all reused rows and the gaps of a job, which is the full prefill of its context."""
        job.recomputed = rows_of(job.plan, job.slots.device).positions
        self.recompute([job], Timings(), self.slice_rows)

    def choose(self, jobs: Sequence[FusionRequest], timings: Timings) -> None:
        """Probe, and choose what is recomputed."""
        with timings.add("probe"):
            scores = self._probe(jobs)
            for i, job in enumerate(jobs):
                if job.chooses and job.selector.fresh_layers:
                    scores[i] = self._compute_first_layers(job)
        with timings.add("select"):
            for job, score in zip(jobs, scores, strict=True):
                job.relevance, job.recomputed = score, _select(job, score)

    def recompute(self, jobs: Sequence[FusionRequest], timings: Timings, behind: int) -> list[Slice]:
        """Recompute what was chosen and the gaps, pass after pass; see :meth:`prepare`."""
        work: list[Slice] = []
        pending = 0
        with timings.add("recompute"):
            for job in jobs:
                gaps = [torch.arange(a, b, device=job.slots.device) for a, b in job.plan.gaps()]
                rows = torch.cat([job.recomputed, *gaps]).sort().values
                begin: Position = job.plan.prefix
                # Slices of one request go in order of position, so that each finds the KV before it fresh.
                while len(rows):
                    part, rows = rows.tensor_split([self.slice_rows - pending])
                    end = rows[0] if len(rows) else job.plan.end
                    work.append(Slice(job, part, begin, end))
                    begin = end
                    pending += len(part)
                    if pending == self.slice_rows:
                        self._pass(work)
                        work, pending = [], 0
            if work and behind + pending > self.slice_rows:
                self._pass(work)
                work = []
        return work

    def _probe(self, jobs: Sequence[FusionRequest]) -> list[torch.Tensor | None]:
        """Question attention over prefix and spans, float32 (end,) a job; None where the rule needs none."""
        bands: dict[range, list[int]] = {}
        for i, job in enumerate(jobs):
            layers = job.selector.probe_layers(self.model.depth)
            if job.chooses and len(layers):
                bands.setdefault(layers, []).append(i)
        scores: list[torch.Tensor | None] = [None] * len(jobs)
        for layers, asked in bands.items():
            attention = ProbePass(self.model, self.device, [jobs[i] for i in asked], layers)
            self.model.forward(attention.tokens, attention.positions, attention)
            for i, score in zip(asked, attention.by_job(), strict=True):
                scores[i] = score
        return scores

    def _compute_first_layers(self, job: FusionRequest) -> torch.Tensor:
        """Compute the layers that the selector wants in full; what it measures on the last of them, (end,)."""
        first = DenseLayersPass(self.model, self.device, job)
        rows = torch.arange(job.plan.prefix, len(job.tokens), device=job.slots.device)
        for part in rows.split(self.slice_rows):
            self.model.forward(job.tokens[part], part, first)
        job.fresh_layers = job.selector.fresh_layers
        return first.scores()

    def _pass(self, work: Sequence[Slice]) -> None:
        rows = self._rows_of(work)
        attend = RecomputePass(self.model, self.device, rows.slots, rows.groups, rows.spreads, kv_only=len(rows.groups))
        self.model.forward(rows.tokens, rows.positions, attend)

    def extended(
        self, work: Sequence[Slice], groups: Sequence[RequestRows], slots: torch.Tensor
    ) -> AbstractContextManager[None]:
        """A context for the model's own forward of the tails, which takes along what is left to recompute.

        Args:
            work: what :meth:`prepare` returned.
            groups: of the forward's own rows.
            slots: int64 (rows,), where their KV goes.
        """
        if not work:
            return self.model.extended(slots[:0], slots[:0], RecomputePass(self.model, self.device, slots, groups))
        rows = self._rows_of(work)
        count = len(rows.tokens)
        behind = [replace(group, begin=group.begin + count, end=group.end + count) for group in groups]
        attend = RecomputePass(
            self.model,
            self.device,
            torch.cat([rows.slots, slots]),
            [*rows.groups, *behind],
            rows.spreads,
            kv_only=len(rows.groups),
        )
        return self.model.extended(rows.tokens, rows.positions, attend)

    def _rows_of(self, work: Sequence[Slice]) -> _PassRows:
        groups, spreads, at = [], [], 0
        for part in work:
            job, rows = part.job, part.rows
            # Only the first plan.end slots are seen; the prompt's length decides how PyTorch's kernel rounds.
            context = torch.cat([job.slots, job.slots[:1].expand(len(job.tokens) - job.plan.end)])
            groups.append(RequestRows(at, at + len(rows), context, rows + 1, job.exact))
            if job.selector.spreads and len(job.recomputed) and not job.exact:
                spreads.append(_spread(part, at))
            at += len(rows)
        return _PassRows(
            torch.cat([part.job.tokens[part.rows] for part in work]),
            torch.cat([part.rows for part in work]),
            torch.cat([part.job.slots[part.rows] for part in work]),
            groups,
            spreads,
        )


@dataclass(frozen=True, slots=True)
class _PassRows:
    """Rows that go through the model in one pass: what they are, where their KV goes, who they belong to."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    groups: list[RequestRows]
    spreads: list[DriftCorrection]


def _spread(part: Slice, at: int) -> DriftCorrection:
    """What a part's rows, which begin at ``at`` in their pass, tell the reused rows among which they stand."""
    job, device = part.job, part.rows.device
    every = rows_of(job.plan, device)
    blocks = PaddedBlocks(every.lengths, device)
    number = torch.searchsorted(every.positions, part.rows)
    real = every.positions[number.clamp(max=len(every.positions) - 1)] == part.rows
    wanted = (every.positions >= part.begin) & (every.positions < part.end)
    known = number.where(real, len(every.positions))
    return DriftCorrection(
        DriftPredictor(known, blocks, candidates_per_block(blocks, len(job.recomputed)), wanted),
        torch.arange(at, at + len(part.rows), device=device),
        job.slots[part.rows],
        part.rows,
        real,
        job.slots[every.positions],
        every.positions,
    )


def _select(job: FusionRequest, score: torch.Tensor | None) -> torch.Tensor:
    rows = rows_of(job.plan, job.slots.device)
    budget = job.selector.budget(job.ratio, job.plan.reused)
    if not job.chooses:
        return rows.positions[: budget[0]]
    if score is None:
        score = torch.zeros(job.plan.end, device=job.slots.device)
    elif not score.is_cpu:
        # Looking would wait for the device; a row whose score is no number is recomputed first.
        score = score.nan_to_num(nan=torch.finfo(score.dtype).max)
    elif not bool(torch.isfinite(score).all()):
        raise FloatingPointError("the scores of reused rows are not finite")
    return job.selector.pick(score, rows, budget)
