"""One request's fused prefill, and the slices in which its rows are recomputed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from a3_sglang.matching.plan import Plan
from a3_sglang.selectors import Budget, Ratio, ReusedRows, Selector


@dataclass(slots=True)
class FusionRequest:
    """One request's fused prefill.

    Attributes:
        plan: which tokens are reused, and from where.
        tokens: int64 (prompt,).
        slots: int64 (plan.end,), by position: the exact prefix's slots, then private ones.
        selector, ratio: which reused rows are recomputed.
        question: positions of the prompt's question, ``(start, end)``; None: see
            :func:`a3_sglang.matching.plan.question_ranges`.
        recomputed_pos: int64, positions of the reused rows to recompute, ascending; set by :meth:`Executor.select
            <a3_sglang.fusion.executor.Executor.select>` or :meth:`select_all`.
        relevance: float32 (plan.end,), the selector's scores at the positions of the reused rows, zero at others; None
            if nothing was measured for them. Set by ``Executor.select``.
        probed_rows, probed_layers: size of the probe.
        dense_layers: layers, from layer 0 on, that were computed for all rows.
    """

    plan: Plan
    tokens: torch.Tensor
    slots: torch.Tensor
    selector: Selector
    ratio: Ratio
    question: tuple[int, int] | None = None
    recomputed_pos: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    relevance: torch.Tensor | None = None
    probed_rows: int = 0
    probed_layers: int = 0
    dense_layers: int = 0
    _reused_rows: ReusedRows | None = field(default=None, init=False, repr=False)

    @property
    def budget(self) -> Budget:
        """How many reused rows are recomputed."""
        return Budget.of(self.selector, self.ratio, self.plan.reused)

    @property
    def exact(self) -> bool:
        """Whether every reused row is recomputed, which makes this a full prefill."""
        return len(self.recomputed_pos) == self.plan.reused

    def reused_rows(self) -> ReusedRows:
        """The reused rows, on the device of the request's tensors; made once."""
        if self._reused_rows is None:
            spans = [(span.start, span.end) for span in self.plan.spans]
            self._reused_rows = ReusedRows.of(spans, self.slots.device)
        return self._reused_rows

    def gap_pos(self) -> list[torch.Tensor]:
        """Positions of each gap, int64."""
        return [torch.arange(start, end, device=self.slots.device) for start, end in self.plan.gap_ranges()]

    def select_all(self) -> None:
        """Recompute every reused row: with the gaps, a full prefill of the context."""
        self.recomputed_pos = self.reused_rows().positions

    def charged(self, depth: int) -> float:
        """Rows with freshly computed QKV, the probe's included, summed over layers, divided by layers x context rows.

        Each row counts once per layer: that recomputed rows pass through the ``dense_layers`` twice is a property of
        this implementation, not of the methods that need these layers.
        """
        context = self.plan.end - self.plan.prefix
        recomputed = len(self.recomputed_pos) + self.plan.gap
        rows = context * self.dense_layers + recomputed * (depth - self.dense_layers)
        return (rows + self.probed_rows * self.probed_layers) / (depth * context)


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one request that run in one pass: everything it recomputes between two positions.

    Attributes:
        request: whose rows they are.
        pos: int64 (rows,), their positions, ascending.
        begin_pos, end_pos: the range ``[begin_pos, end_pos)``; on the device if its value is only known there.
    """

    request: FusionRequest
    pos: torch.Tensor
    begin_pos: int | torch.Tensor
    end_pos: int | torch.Tensor
