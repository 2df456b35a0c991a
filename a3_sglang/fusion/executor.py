"""The fused prefill of a batch of planned requests: copy, probe, select, recompute."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from a3_sglang.drift import BLOCK, Drift
from a3_sglang.fusion.plan import Plan
from a3_sglang.fusion.rotation import RopeTable, copy_rotated, rotate
from a3_sglang.fusion.row_attention import Attention, RowAttention, RowGroup
from a3_sglang.kernels.relevance import attention_weights, hidden_columns, key_columns, relevance
from a3_sglang.selectors import FreshLayer, Ratio, Rows, Selector

logger = logging.getLogger(__name__)

QUESTION_TOKENS = 64
"""Tokens at a prompt's end whose attention the probe reads."""


class PassOver(Exception):  # noqa: N818 - no error
    """Raised by :meth:`Attend.attend` where nothing behind it is wanted; ends the pass."""


class Attend(ABC):
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
            PassOver: no layer behind this one is wanted.
        """


class Model(ABC):
    """The model as the executor needs it: a pool of KV slots and passes over arbitrary rows."""

    depth: int
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    ropes: Mapping[int, RopeTable]

    @abstractmethod
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> None:
        """Run rows through the layers, until ``attend`` raises :class:`PassOver` or to the end.

        Args:
            tokens: int64 (rows,).
            positions: int64 (rows,).
            attend: takes the place of the model's attention.
        """

    @abstractmethod
    def attention(self, attend: Attend) -> AbstractContextManager[None]:
        """A context in which the model attends through ``attend``."""


@dataclass(slots=True)
class Job:
    """One request's fused prefill.

    Attributes:
        plan: what comes from where.
        tokens: int64 (prompt,).
        slots: int64 (plan.end,), the exact prefix's slots and the private ones behind it.
        selector, ratio: which reused rows are recomputed.
        recomputed: int64, positions of the reused rows that were recomputed, ascending; set by :meth:`Executor.run`.
        probed_rows, probed_layers: size of the probe.
        fresh_layers: layers, from layer 0 on, that were computed for all rows.
    """

    plan: Plan
    tokens: torch.Tensor
    slots: torch.Tensor
    selector: Selector
    ratio: Ratio
    recomputed: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
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


@dataclass(slots=True)
class Timings:
    """Milliseconds of one batch's fused prefill; on a device that runs on its own they hold the launches."""

    copy_ms: float = 0.0
    probe_ms: float = 0.0
    select_ms: float = 0.0
    recompute_ms: float = 0.0
    tail_ms: float = 0.0

    @contextmanager
    def add(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + (time.perf_counter() - started) * 1e3)


class Executor:
    """Runs jobs on a model.

    Args:
        model: see :class:`Model`.
        attention: how rows attend on this device.
        slice_rows: rows that go through the model at once, at most.
    """

    def __init__(self, model: Model, attention: RowAttention, slice_rows: int = 8192) -> None:
        self.model = model
        self.attention = attention
        self.slice_rows = slice_rows

    def copy(self, source: torch.Tensor, target: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        """Copy KV rows between slots in all layers, keys turned from their old to their new positions.

        Args:
            source: int64 (n,), slots to copy from.
            target: int64 (n,), slots to copy to; none of ``source``.
            old: int64 (n,), positions of the keys in ``source``.
            new: int64 (n,), positions they are turned to.
        """
        turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in range(self.model.depth):
            rope = self.model.ropes[layer]
            if id(rope) not in turns:
                turns[id(rope)] = rope.turn(old, new)
            copy_rotated(self.model.keys[layer], self.model.values[layer], source, target, turns[id(rope)], rope.neox)

    def run(self, jobs: Sequence[Job], timings: Timings) -> None:
        """Make the KV between each job's prefix and tail ready, in place.

        An error in probe or selection is no reason to lose a request: its reused rows are then all recomputed,
        which is the full prefill.
        """
        try:
            with timings.add("probe_ms"):
                scores = self._probe(jobs)
                for i, job in enumerate(jobs):
                    if job.chooses and job.selector.fresh_layers:
                        scores[i] = self._compute_first_layers(job)
            with timings.add("select_ms"):
                for job, score in zip(jobs, scores, strict=True):
                    job.recomputed = _select(job, score)
        except Exception:
            logger.exception("a3: the probe failed; all reused rows of this batch are recomputed")
            for job in jobs:
                job.recomputed = _reused_positions(job.plan, job.slots.device)
        with timings.add("recompute_ms"):
            self._recompute(jobs)

    def _probe(self, jobs: Sequence[Job]) -> list[torch.Tensor | None]:
        """Question attention over prefix and spans, float32 (end,) a job; None where the rule needs none."""
        asked: list[tuple[Job, range]] = []
        for job in jobs:
            layers = job.selector.probe_layers(self.model.depth)
            if job.chooses and len(layers):
                asked.append((job, layers))
        if not asked:
            return [None] * len(jobs)
        depth = max(layers.stop for _, layers in asked)
        probes, begin = [], 0
        for job, layers in asked:
            rows = min(QUESTION_TOKENS, len(job.tokens) - job.plan.end)
            probes.append(_Probe(job, layers, begin, rows))
            job.probed_rows, job.probed_layers = rows, depth
            begin += rows
        self.model.forward(
            torch.cat([p.job.tokens[-p.rows :] for p in probes]),
            torch.cat([p.positions for p in probes]),
            _ProbeAttention(self, probes),
        )
        by_job = {id(p.job): p.scores for p in probes}
        return [by_job.get(id(job)) for job in jobs]

    def _compute_first_layers(self, job: Job) -> torch.Tensor:
        """Compute the layers that the selector wants in full; what it measures on the last of them, (end,)."""
        first = _FirstLayers(self, job)
        rows = torch.arange(job.plan.prefix, len(job.tokens), device=job.slots.device)
        for part in rows.split(self.slice_rows):
            self.model.forward(job.tokens[part], part, first)
        job.fresh_layers = job.selector.fresh_layers
        return first.scores()

    def _recompute(self, jobs: Sequence[Job]) -> None:
        """One pass over the chosen rows and the gaps of all jobs; more where they exceed ``slice_rows``."""
        work: list[_Part] = []
        pending = 0
        for job in jobs:
            gaps = [torch.arange(a, b, device=job.slots.device) for a, b in job.plan.gaps()]
            rows = torch.cat([job.recomputed, *gaps]).sort().values
            begin = job.plan.prefix
            # Slices of one request go in order of position, so that each finds the KV before it fresh.
            while len(rows):
                part, rows = rows.tensor_split([self.slice_rows - pending])
                end = int(rows[0]) if len(rows) else job.plan.end
                work.append(_Part(job, part, begin, end))
                begin = end
                pending += len(part)
                if pending == self.slice_rows:
                    self._pass(work)
                    work, pending = [], 0
        if work:
            self._pass(work)

    def _pass(self, work: Sequence[_Part]) -> None:
        groups, spreads, at = [], [], 0
        for part in work:
            job, rows = part.job, part.rows
            # Only the first plan.end slots are seen; the prompt's length decides how PyTorch's kernel rounds.
            context = torch.cat([job.slots, job.slots[:1].expand(len(job.tokens) - job.plan.end)])
            groups.append(RowGroup(at, at + len(rows), context, rows + 1, job.exact))
            if job.selector.spreads and not job.exact:
                spreads.append(_Spread(self.model, part, at))
            at += len(rows)
        self.model.forward(
            torch.cat([part.job.tokens[part.rows] for part in work]),
            torch.cat([part.rows for part in work]),
            RowsAttention(
                self, torch.cat([part.job.slots[part.rows] for part in work]), groups, spreads=spreads, kv_only=True
            ),
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one job that go through the model in one pass: all it recomputes of ``[begin, end)``."""

    job: Job
    rows: torch.Tensor
    begin: int
    end: int


class _Spread:
    """Takes the drift that recomputed rows show off the reused rows between them; see ``drift.py``."""

    def __init__(self, model: Model, part: _Part, at: int) -> None:
        job, device = part.job, part.rows.device
        here = [
            (max(span.start, part.begin), min(span.end, part.end))
            for span in job.plan.spans
            if span.start < part.end and part.begin < span.end
        ]
        reused = torch.cat([torch.arange(a, b, device=device) for a, b in here]) if here else part.rows[:0]
        chosen = torch.isin(reused, job.recomputed)
        self._model, self._chosen, self._kept = model, reused[chosen], reused[~chosen]
        self._known, self._wanted = job.slots[self._chosen], job.slots[self._kept]
        self._rows = at + torch.searchsorted(part.rows, self._chosen)
        self._drift = Drift(self._chosen, self._kept, [start for a, b in here for start in range(a, b, BLOCK)])
        self._turns: dict[int, tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Correct the layer's kept rows; the chosen rows' slots still hold what was copied.

        Args:
            layer: the layer's number.
            key: (rows, kv_heads, head_dim), those of the pass, after RoPE.
            value: like ``key``.
        """
        keys, values, rope = self._model.keys[layer], self._model.values[layer], self._model.ropes[layer]
        if id(rope) not in self._turns:
            back = rope.turn(self._chosen, torch.zeros_like(self._chosen))
            self._turns[id(rope)] = back, rope.turn(torch.zeros_like(self._kept), self._kept)
        back, forth = self._turns[id(rope)]
        drift = rotate(key[self._rows].float() - keys[self._known].float(), *back, rope.neox)
        moved = rotate(self._drift.of_keys(drift), *forth, rope.neox)
        keys[self._wanted] = (keys[self._wanted].float() + moved).to(keys.dtype)
        moved = self._drift.of_values(value[self._rows].float() - values[self._known].float())
        values[self._wanted] = (values[self._wanted].float() + moved).to(values.dtype)


class RowsAttention(Attend):
    """Rows whose KV is written to their slots before they attend.

    Args:
        spreads: what is done before, while the slots still hold the copied KV.
        kv_only: nothing but the rows' KV is wanted, so the pass ends with the last layer's.
    """

    def __init__(
        self,
        executor: Executor,
        slots: torch.Tensor,
        groups: Sequence[RowGroup],
        spreads: Sequence[_Spread] = (),
        kv_only: bool = False,
    ) -> None:
        self._model, self._attention = executor.model, executor.attention
        self._slots, self._groups, self._spreads = slots, groups, spreads
        self._run: Attention | None = None
        self._last = executor.model.depth - 1 if kv_only else -1

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        keys, values = self._model.keys[layer], self._model.values[layer]
        if layer:  # KV of layer 0 has seen no context, so it has no drift.
            for spread in self._spreads:
                spread(layer, key, value)
        keys.index_copy_(0, self._slots, key.to(keys.dtype))
        values.index_copy_(0, self._slots, value.to(values.dtype))
        if layer == self._last:
            raise PassOver
        if self._run is None:
            self._run = self._attention.plan(self._groups, query.shape[1], key.shape[1], query.dtype)
        return self._run(query, keys, values, scaling)


class _Probe:
    """The question of one job: its last rows, over the prefix and the spans as they were copied."""

    def __init__(self, job: Job, layers: range, begin: int, rows: int) -> None:
        device = job.slots.device
        self.job, self.layers, self.begin, self.rows = job, layers, begin, rows
        self.positions = torch.arange(len(job.tokens) - rows, len(job.tokens), device=device)
        known = torch.cat([torch.arange(job.plan.prefix, device=device), _reused_positions(job.plan, device)])
        self.known, self.slots = known, job.slots[known]
        self.hidden = hidden_columns(torch.arange(1, rows + 1, device=device) + len(known))
        self.scores = torch.zeros(job.plan.end, device=device)
        self._room: dict[str, torch.Tensor] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        own: Sequence[torch.Tensor],
        pools: Sequence[torch.Tensor],
        scaling: float,
    ) -> torch.Tensor:
        """Attention over the known context and the rows themselves, whose KV gets no slot.

        Args:
            layer: the layer's number.
            query: (rows, heads, head_dim).
            own: keys and values of the rows, each (rows, kv_heads, head_dim).
            pools: keys and values of the layer, each (slots, kv_heads, head_dim).
            scaling: factor of the logits.
        """
        heads, count, total = query.shape[1], len(self.known), len(self.known) + self.rows
        keys, values = (self._take(name, total, x[:0]) for name, x in zip("kv", own, strict=True))
        for context, pool, fresh in zip((keys, values), pools, own, strict=True):
            torch.index_select(pool, 0, self.slots, out=context[:count])
            context[count:] = fresh
        weights = self._take("weights", heads * self.rows * total, self.scores[:0])
        weights = attention_weights(query, key_columns(keys), self.hidden, scaling, weights)
        if layer in self.layers:
            self.scores[self.known] += relevance(weights, self.rows, values)[:count]
        mixed = torch.bmm(weights.to(values.dtype), values.movedim(0, 1).contiguous())
        return mixed.view(heads, self.rows, -1).movedim(0, 1)

    def _take(self, name: str, count: int, like: torch.Tensor) -> torch.Tensor:
        """Room for ``count`` rows like those of ``like``; the same for all layers."""
        if name not in self._room:
            self._room[name] = like.new_empty(count, *like.shape[1:])
        return self._room[name]


class _ProbeAttention(Attend):
    """The pass ends with the last layer that is asked for."""

    def __init__(self, executor: Executor, probes: Sequence[_Probe]) -> None:
        self._model, self._probes = executor.model, probes
        self._last = max(probe.layers.stop for probe in probes) - 1

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        pools = self._model.keys[layer], self._model.values[layer]
        for probe in self._probes:
            part = slice(probe.begin, probe.begin + probe.rows)
            out[part] = probe.attend(layer, query[part], (key[part], value[part]), pools, scaling)
        if layer == self._last:
            raise PassOver
        return out


class _FirstLayers(Attend):
    """All rows behind one job's exact prefix, in slices by position; the context's KV goes to its slots."""

    def __init__(self, executor: Executor, job: Job) -> None:
        self._model, self._attention, self._job = executor.model, executor.attention, job
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
            raise PassOver
        keys, values = (
            torch.cat([pool[job.slots], *parts]) for pool, parts in zip(pools, zip(*tail, strict=True), strict=True)
        )
        visible = torch.arange(self._at, end, device=query.device) + 1
        group = RowGroup(0, len(query), torch.arange(len(keys), device=query.device), visible, True)
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
        reused = _reused_positions(job.plan, job.slots.device)
        scores[reused] = measured[reused - job.plan.prefix]
        return scores


def _select(job: Job, score: torch.Tensor | None) -> torch.Tensor:
    positions = _reused_positions(job.plan, job.slots.device)
    budget = job.selector.budget(job.ratio, len(positions))
    if not job.chooses:
        return positions[: budget[0]]
    if score is None:
        score = torch.zeros(job.plan.end, device=positions.device)
    elif not bool(torch.isfinite(score).all()):
        raise FloatingPointError("the scores of reused rows are not finite")
    return job.selector.pick(score, Rows(positions, positions - _span_starts(job.plan, positions.device)), budget)


def _reused_positions(plan: Plan, device: Any) -> torch.Tensor:
    return torch.cat([torch.arange(span.start, span.end, device=device) for span in plan.spans])


def _span_starts(plan: Plan, device: Any) -> torch.Tensor:
    """Where the span of each reused row begins."""
    return torch.cat([torch.full((span.length,), span.start, device=device) for span in plan.spans])
