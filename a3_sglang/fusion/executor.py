"""The fused prefill of a batch of planned requests: copy, select, recompute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from a3_sglang.attention.base import RequestRows
from a3_sglang.drift.model import DriftModel
from a3_sglang.fusion.interface import Model
from a3_sglang.fusion.ops import Ops
from a3_sglang.fusion.passes import DenseLayersPass, ProbePass, RecomputePass
from a3_sglang.fusion.request import FusionRequest, Slice
from a3_sglang.selectors import DenseLayer, DenseLayers, ProbeLayers, Selector, pick
from a3_sglang.timing import Timings

SLICE_ROWS = 8192
"""Default limit on the rows of a forward pass."""


class Executor:
    """Runs fused prefills on a model.

    Each request goes through :meth:`copy`, :meth:`select` and :meth:`recompute`. Then the KV between its prefix and its
    tail is complete, except for the leftover that :meth:`recompute` returns: these rows run in the forward pass of the
    tails, within :meth:`with_leftover`.

    Args:
        model: holds the KV and runs the passes.
        ops: the operations for the device of the model's KV.
        slice_rows: limit on the rows of a forward pass.
    """

    def __init__(self, model: Model, ops: Ops, slice_rows: int = SLICE_ROWS) -> None:
        self.model = model
        self.ops = ops
        self.slice_rows = slice_rows
        by_rope: dict[int, list[int]] = {}
        for layer in range(model.depth):
            by_rope.setdefault(id(model.ropes[layer]), []).append(layer)
        self._pools = [
            (model.ropes[layers[0]], ops.pools([model.keys[i] for i in layers], [model.values[i] for i in layers]))
            for layers in by_rope.values()
        ]

    def copy(self, request: FusionRequest, donor_slots: torch.Tensor) -> None:
        """Copy the KV of a request's spans to its slots in all layers, keys rotated to their new positions.

        Args:
            request: whose slots are written.
            donor_slots: int64 (plan.reused,), slots to copy from, span after span; none of the request's own.
        """
        spans, device = request.plan.spans, donor_slots.device
        old_pos = torch.cat([torch.arange(s.offset, s.offset + s.length, device=device) for s in spans])
        new_pos = request.reused_rows().positions
        for rope, pools in self._pools:
            self.ops.copy(pools, donor_slots, request.slots[new_pos], rope.rotation(old_pos, new_pos), rope.neox)

    def select(self, requests: Sequence[FusionRequest], timings: Timings) -> None:
        """Choose the reused rows to recompute.

        Args:
            requests: of one batch, their spans copied; ``recomputed_pos`` and ``relevance`` are set.
            timings: the parts "probe" and "select" are added.

        Raises:
            FloatingPointError: scores are not finite, on a CPU.
        """
        with timings.add("probe"):
            signals = self._probe(requests)
            scores = [self._score(request, signal) for request, signal in zip(requests, signals, strict=True)]
        with timings.add("select"):
            for request, score in zip(requests, scores, strict=True):
                request.relevance = _relevance(request, score)
            _select(requests, scores, self.model.drift)

    def recompute(self, requests: Sequence[FusionRequest], timings: Timings, room: int = 0) -> list[Slice]:
        """Recompute the selected rows and the gaps, pass by pass.

        Args:
            requests: of one batch.
            timings: the part "recompute" is added.
            room: rows that still fit into the tails' forward pass; 0 runs everything here.

        Returns:
            The leftover, at most ``room`` rows, for :meth:`with_leftover`.
        """
        slices: list[Slice] = []
        pending = 0
        with timings.add("recompute"):
            for request in requests:
                rest_pos = torch.cat([request.recomputed_pos, *request.gap_pos()]).sort().values
                begin_pos: int | torch.Tensor = request.plan.prefix
                # In order of position, so that each slice finds the KV before it recomputed.
                while len(rest_pos):
                    pos, rest_pos = rest_pos.tensor_split([self.slice_rows - pending])
                    end_pos = rest_pos[0] if len(rest_pos) else request.plan.end
                    slices.append(Slice(request, pos, begin_pos, end_pos))
                    begin_pos = end_pos
                    pending += len(pos)
                    if pending == self.slice_rows:
                        self._run(slices)
                        slices, pending = [], 0
            if slices and pending > room:
                self._run(slices)
                slices = []
        return slices

    def with_leftover(
        self, leftover: Sequence[Slice], extend: Sequence[RequestRows], slots: torch.Tensor
    ) -> AbstractContextManager[None]:
        """A context for the model's own forward of the tails, which recomputes the leftover in the same pass.

        Args:
            leftover: what :meth:`recompute` returned; may be empty.
            extend: the rows of each request in this forward.
            slots: int64 (rows,), where their KV goes.
        """
        attend = RecomputePass(self.model, self.ops, leftover, extend, slots)
        return self.model.prepending(attend.tokens, attend.positions, attend)

    def _probe(self, requests: Sequence[FusionRequest]) -> list[torch.Tensor | None]:
        """Question attention over prefix and spans, float32 (plan.end,) per request; None if it is not needed."""
        by_needs: dict[ProbeLayers, list[int]] = {}
        for i, request in enumerate(requests):
            needs = request.selector.needs
            if isinstance(needs, ProbeLayers) and request.budget.leaves_choice:
                by_needs.setdefault(needs, []).append(i)
        signals: list[torch.Tensor | None] = [None] * len(requests)
        for needs, members in by_needs.items():
            probe = ProbePass(self.model, self.ops, [requests[i] for i in members], needs)
            self.model.forward(probe.tokens, probe.positions, probe)
            for i, signal in zip(members, probe.by_request(), strict=True):
                signals[i] = signal
        return signals

    def _score(self, request: FusionRequest, probed: torch.Tensor | None) -> torch.Tensor | None:
        """The selector's scores, float32 (reused,); None if the budget leaves no choice."""
        if not request.budget.leaves_choice:
            return None
        needs = request.selector.needs
        signal = self._dense_layer(request, needs.count) if isinstance(needs, DenseLayers) else probed
        return request.selector.score(signal, request.reused_rows())

    def _dense_layer(self, request: FusionRequest, count: int) -> DenseLayer:
        """Compute ``count`` layers for all rows after the exact prefix; the last of them."""
        dense = DenseLayersPass(self.model, self.ops, request, count)
        all_pos = torch.arange(request.plan.prefix, len(request.tokens), device=request.slots.device)
        for pos in all_pos.split(self.slice_rows):
            self.model.forward(request.tokens[pos], pos, dense)
        request.dense_layers = count
        return dense.last_layer()

    def _run(self, slices: Sequence[Slice]) -> None:
        attend = RecomputePass(self.model, self.ops, slices)
        self.model.forward(attend.tokens, attend.positions, attend)


def _relevance(request: FusionRequest, score: torch.Tensor | None) -> torch.Tensor | None:
    """Scores by position, float32 (plan.end,); None if they are not measured."""
    if score is None or request.selector.needs is None:
        return None
    by_position = torch.zeros(request.plan.end, device=request.slots.device)
    return by_position.index_copy_(0, request.reused_rows().positions, score)


def _select(requests: Sequence[FusionRequest], scores: Sequence[torch.Tensor | None], drift: DriftModel) -> None:
    """Set the positions of the rows to recompute, int64, ascending; without scores, all or none."""
    scored: dict[Selector, list[tuple[FusionRequest, torch.Tensor]]] = {}
    for request, score in zip(requests, scores, strict=True):
        if score is None:
            request.recomputed_pos = request.reused_rows().positions[: request.budget.least]
        else:
            scored.setdefault(request.selector, []).append((request, _finite(score)))
    for selector, members in scored.items():
        rows, budgets = [request.reused_rows() for request, _ in members], [request.budget for request, _ in members]
        picked = pick(selector, [score for _, score in members], rows, budgets, drift)
        for (request, _), positions in zip(members, picked, strict=True):
            request.recomputed_pos = positions


def _finite(score: torch.Tensor) -> torch.Tensor:
    """Scores that can be ranked."""
    if not score.is_cpu:
        # Testing for NaN would force a host-device sync, so NaN scores are ranked first: these rows are recomputed.
        return score.nan_to_num(nan=torch.finfo(score.dtype).max)
    if not bool(torch.isfinite(score).all()):
        raise FloatingPointError("the scores of reused rows are not finite")
    return score
