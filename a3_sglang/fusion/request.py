"""One request's fused prefill, and the slices in which its rows are recomputed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from a3_sglang.matching.plan import Plan
from a3_sglang.selectors import Ratio, Rows, Selector


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


Position = int | torch.Tensor
"""A position that may be known on the device only."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one job that go through the model in one pass: all it recomputes of ``[begin, end)``."""

    job: FusionRequest
    rows: torch.Tensor
    begin: Position
    end: Position


def rows_of(plan: Plan, device: Any) -> Rows:
    return Rows.of([(span.start, span.end) for span in plan.spans], device)
