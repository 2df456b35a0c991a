"""The fused prefill of a batch of planned requests: copy, probe, select, recompute."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from a3_sglang.attention.base import ProbeFn, ProbeRows, RequestRows, RowAttentionFn
from a3_sglang.drift.correction import DriftCorrection
from a3_sglang.fusion.ops import Ops
from a3_sglang.matching.plan import Plan, question_ranges
from a3_sglang.rope import RopeTable
from a3_sglang.selectors import FreshLayer, Ratio, Rows, Selector

SLICE_ROWS = 8192
"""Rows that go through the model at once, at most, where nothing else is said."""


class StopForward(Exception):  # noqa: N818 - no error
    """Raised by :meth:`AttentionHook.attend` where nothing behind it is wanted; ends the pass."""


class AttentionHook(ABC):
    """What happens where a layer of the model attends."""

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of a pass's rows at one layer.

        Args:
            layer: the layer's number.
            query: (rows, heads, head_dim), after RoPE.
            key: (rows, kv_heads, head_dim), the rows' own, after RoPE.
            value: like ``key``.
            scaling: factor of the logits.

        Returns:
            (rows, heads, head_dim).

        Raises:
            StopForward: no layer behind this one is wanted.
        """


class Model(ABC):
    """The model as the executor needs it: a pool of KV slots and passes over arbitrary rows."""

    depth: int
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    ropes: Mapping[int, RopeTable]

    @abstractmethod
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        """Run rows through the layers, until ``attend`` raises :class:`StopForward` or to the end.

        Args:
            tokens: int64 (rows,).
            positions: int64 (rows,).
            attend: takes the place of the model's attention.
        """

    @abstractmethod
    def extend(self, tokens: torch.Tensor, positions: torch.Tensor) -> Any:
        """The model's own forward of rows, head included, as of a batch's tails; within :meth:`extended`.

        Args:
            tokens: int64 (rows,).
            positions: int64 (rows,).
        """

    @abstractmethod
    def extended(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook
    ) -> AbstractContextManager[None]:
        """A context for the model's own forward of other rows: it attends through ``attend``, and these rows go first.

        Args:
            tokens: int64 (rows,), may be none.
            positions: int64 (rows,).
            attend: takes the place of the model's attention.

        Raises:
            RuntimeError: at the end, if no forward took the rows along.
        """


@dataclass(slots=True)
class FusionRequest:
    """One request's fused prefill.

    Attributes:
        plan: what comes from where.
        tokens: int64 (prompt,).
        slots: int64 (plan.end,), the exact prefix's slots and the private ones behind it.
        selector, ratio: which reused rows are recomputed.
        question: positions of the prompt's question, ``(start, end)``; None: see :func:`question_ranges`.
        recomputed: int64, positions of the reused rows that were recomputed, ascending; set by :meth:`Executor.run`.
        relevance: float32 (plan.end,), what the selector ranked the reused rows by, zero at other positions; None:
            it measured nothing. Set by :meth:`Executor.choose`.
        probed_rows, probed_layers: size of the probe.
        fresh_layers: layers, from layer 0 on, that were computed for all rows.
    """

    plan: Plan
    tokens: torch.Tensor
    slots: torch.Tensor
    selector: Selector
    ratio: Ratio
    question: tuple[int, int] | None = None
    recomputed: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    relevance: torch.Tensor | None = None
    probed_rows: int = 0
    probed_layers: int = 0
    fresh_layers: int = 0

    @property
    def chooses(self) -> bool:
        """Whether the budget leaves the selector a choice."""
        budget = self.selector.budget(self.ratio, self.plan.reused)
        return budget[-1] > 0 and budget[0] < self.plan.reused

    @property
    def exact(self) -> bool:
        """Whether nothing is reused as it is, which makes it a full prefill."""
        return len(self.recomputed) == self.plan.reused

    def charged(self, depth: int) -> float:
        """Rows with freshly computed QKV, summed over layers, over (layers x rows between prefix and tail).

        A layer's row counts once: that chosen rows pass through the ``fresh_layers`` twice is our doing, not that of
        the methods which ask for them.
        """
        context = self.plan.end - self.plan.prefix
        rows = context * self.fresh_layers + (len(self.recomputed) + self.plan.gap) * (depth - self.fresh_layers)
        return (rows + self.probed_rows * self.probed_layers) / (depth * context)


class Timings:
    """How long the parts of one batch's fused prefill took.

    Args:
        device: where it runs. On CUDA its own time is taken, of which the host knows nothing; None: the host's time.
    """

    PARTS = ("copy", "probe", "select", "recompute", "tail")

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._taken: list[tuple[str, Any, Any]] = []
        self.part = self.PARTS[0]
        """The part that was begun last."""

    @contextmanager
    def add(self, part: str) -> Iterator[None]:
        """Time what runs within it, as a part in :attr:`PARTS`."""
        self.part = part
        begin = self._now()
        yield
        self._taken.append((part, begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ready(self) -> bool:
        """Whether all that was timed is over, so that nothing has to wait for it."""
        return not self._cuda or all(end.query() for _, _, end in self._taken)

    def milliseconds(self) -> dict[str, float]:
        """Of each part, as ``copy_ms`` and so on; waits for the device."""
        sums = dict.fromkeys((f"{part}_ms" for part in self.PARTS), 0.0)
        for part, begin, end in self._taken:
            if self._cuda:
                end.synchronize()
            sums[f"{part}_ms"] += begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3
        return sums


class Executor:
    """Runs jobs on a model.

    Args:
        model: see :class:`Model`.
        ops: of the device that holds the model's KV.
        slice_rows: rows that go through the model at once, at most.
    """

    def __init__(self, model: Model, ops: Ops, slice_rows: int = SLICE_ROWS) -> None:
        self.model = model
        self.ops = ops
        self.slice_rows = slice_rows
        layers: dict[int, list[int]] = {}
        for layer in range(model.depth):
            layers.setdefault(id(model.ropes[layer]), []).append(layer)
        self._pools = [
            (model.ropes[same[0]], ops.pools([model.keys[i] for i in same], [model.values[i] for i in same]))
            for same in layers.values()
        ]

    def copy(self, source: torch.Tensor, target: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        """Copy KV rows between slots in all layers, keys rotated from their old to their new positions.

        Args:
            source: int64 (n,), slots to copy from.
            target: int64 (n,), slots to copy to; none of ``source``.
            old: int64 (n,), positions of the keys in ``source``.
            new: int64 (n,), positions they are rotated to.
        """
        for rope, pools in self._pools:
            self.ops.copy(pools, source, target, rope.rotation(old, new), rope.neox)

    def fill(self, job: FusionRequest, sources: torch.Tensor) -> None:
        """Copy a job's spans to their places.

        Args:
            job: whose slots are written.
            sources: int64 (plan.reused,), the donors' slots, span after span.
        """
        device, spans = sources.device, job.plan.spans
        old = torch.cat([torch.arange(s.offset, s.offset + s.length, device=device) for s in spans])
        new = _rows(job.plan, device).positions
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
        job.recomputed = _rows(job.plan, job.slots.device).positions
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
                gaps = [torch.arange(a, b, device=job.slots.device) for a, b in job.plan.gap_ranges()]
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
            attention = ProbePass(self, [jobs[i] for i in asked], layers)
            self.model.forward(attention.tokens, attention.positions, attention)
            for i, score in zip(asked, attention.by_job(), strict=True):
                scores[i] = score
        return scores

    def _compute_first_layers(self, job: FusionRequest) -> torch.Tensor:
        """Compute the layers that the selector wants in full; what it measures on the last of them, (end,)."""
        first = DenseLayersPass(self, job)
        rows = torch.arange(job.plan.prefix, len(job.tokens), device=job.slots.device)
        for part in rows.split(self.slice_rows):
            self.model.forward(job.tokens[part], part, first)
        job.fresh_layers = job.selector.fresh_layers
        return first.scores()

    def _pass(self, work: Sequence[Slice]) -> None:
        rows = self._rows_of(work)
        attend = RecomputePass(self, rows.slots, rows.groups, rows.corrections, kv_only=len(rows.groups))
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
            return self.model.extended(slots[:0], slots[:0], RecomputePass(self, slots, groups))
        rows = self._rows_of(work)
        count = len(rows.tokens)
        behind = [replace(group, begin=group.begin + count, end=group.end + count) for group in groups]
        attend = RecomputePass(
            self, torch.cat([rows.slots, slots]), [*rows.groups, *behind], rows.corrections, kv_only=len(rows.groups)
        )
        return self.model.extended(rows.tokens, rows.positions, attend)

    def _rows_of(self, work: Sequence[Slice]) -> _PassRows:
        groups, corrections, at = [], [], 0
        for part in work:
            job, rows = part.job, part.rows
            # Only the first plan.end slots are seen; the prompt's length decides how PyTorch's kernel rounds.
            context = torch.cat([job.slots, job.slots[:1].expand(len(job.tokens) - job.plan.end)])
            groups.append(RequestRows(at, at + len(rows), context, rows + 1, job.exact))
            if job.selector.corrects_drift and len(job.recomputed) and not job.exact:
                corrections.append(_correction(part, at))
            at += len(rows)
        return _PassRows(
            torch.cat([part.job.tokens[part.rows] for part in work]),
            torch.cat([part.rows for part in work]),
            torch.cat([part.job.slots[part.rows] for part in work]),
            groups,
            corrections,
        )


Position = int | torch.Tensor
"""A position that may be known on the device only."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one job that go through the model in one pass: all it recomputes of ``[begin, end)``."""

    job: FusionRequest
    rows: torch.Tensor
    begin: Position
    end: Position


@dataclass(frozen=True, slots=True)
class _PassRows:
    """Rows that go through the model in one pass: what they are, where their KV goes, who they belong to."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    groups: list[RequestRows]
    corrections: list[DriftCorrection]


class RecomputePass(AttentionHook):
    """Rows whose KV is written to their slots before they attend.

    Args:
        slots: int64 (rows,), where the rows' KV goes.
        groups: who owns which rows.
        corrections: what is done before, while the slots still hold the copied KV.
        kv_only: groups at the beginning of which nothing but the KV is wanted. In the last layer only the rows of the
            others attend; where there are none, the pass ends there.
    """

    def __init__(
        self,
        executor: Executor,
        slots: torch.Tensor,
        groups: Sequence[RequestRows],
        corrections: Sequence[DriftCorrection] = (),
        kv_only: int = 0,
    ) -> None:
        self._model, self._ops = executor.model, executor.ops
        self._slots, self._groups, self._corrections, self._kv_only = slots, groups, corrections, kv_only
        self._run: RowAttentionFn | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        keys, values = self._model.keys[layer], self._model.values[layer]
        if layer:  # KV of layer 0 has seen no context, so it has no drift.
            for correction in self._corrections:
                self._ops.correct_drift((keys, values), (key, value), correction, self._model.ropes[layer])
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

    def _plan(self, groups: Sequence[RequestRows], query: torch.Tensor, keys: torch.Tensor) -> RowAttentionFn:
        return self._ops.row_attention.plan(groups, query.shape[1], keys.shape[1], query.dtype)


class ProbePass(AttentionHook):
    """The questions of some jobs over their prefixes and spans as they were copied.

    Wherever a question is in its prompt, its rows get the prompt's last positions, after all known context. They do
    not attend to the rest of gaps and tail, get no slots and write no KV. The pass ends after the last layer whose
    scores are wanted.
    """

    def __init__(self, executor: Executor, jobs: Sequence[FusionRequest], layers: range) -> None:
        self._model, self._ops = executor.model, executor.ops
        self._jobs, self._layers = jobs, layers
        self._known, self._questions, tokens, positions, begin = [], [], [], [], 0
        for job in jobs:
            device, end = job.slots.device, len(job.tokens)
            asked = [job.tokens[start:stop] for start, stop in question_ranges(job.plan, end, job.question)]
            rows = sum(map(len, asked))
            job.probed_rows, job.probed_layers = rows, layers.stop
            known = torch.cat([torch.arange(job.plan.prefix, device=device), _rows(job.plan, device).positions])
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
            self._ask = self._ops.probe_attention.plan(self._questions, query.shape[1], key.shape[1])
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

    def __init__(self, executor: Executor, job: FusionRequest) -> None:
        self._model, self._attention, self._job = executor.model, executor.ops.row_attention, job
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
        reused = _rows(job.plan, job.slots.device).positions
        scores[reused] = measured[reused - job.plan.prefix]
        return scores


def _correction(part: Slice, at: int) -> DriftCorrection:
    """Drift correction of one slice, whose rows start at row ``at`` of the pass."""
    job, reused = part.job, _rows(part.job.plan, part.rows.device)
    return DriftCorrection.plan(
        reused.positions, reused.lengths, job.slots, part.rows, at, len(job.recomputed), part.begin, part.end
    )


def _select(job: FusionRequest, score: torch.Tensor | None) -> torch.Tensor:
    rows = _rows(job.plan, job.slots.device)
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


def _rows(plan: Plan, device: Any) -> Rows:
    return Rows.of([(span.start, span.end) for span in plan.spans], device)
