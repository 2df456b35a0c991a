"""How many reused rows are recomputed, whichever they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from a3_sglang.drift.model import DEFAULT, DriftModel
from a3_sglang.selectors.base import ReusedRows, Selector

Ratio = float | Literal["auto"]
"""Share of the reused rows that is recomputed; ``"auto"`` derives it from the question's attention."""

AUTO_SHARE, AUTO_USUAL, AUTO_FLOOR, AUTO_CAP = 0.7, 0.15, 0.05, 0.4
"""With ``ratio="auto"``: the share of the scores to cover, then three shares of the reused rows: the usual one, towards
which the budget is drawn, and its bounds."""


def typical_ratio(ratio: Ratio) -> float:
    """The share of the reused rows that is typically recomputed."""
    return AUTO_USUAL if ratio == "auto" else ratio


def max_ratio(ratio: Ratio) -> float:
    """The largest share of the reused rows that may be recomputed."""
    return AUTO_CAP if ratio == "auto" else ratio


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds on the number of rows to recompute; equal unless the ratio is ``"auto"``.

    Attributes:
        reused: reused rows of the request.
        least, most: the bounds, both inclusive.
    """

    reused: int
    least: int
    most: int

    @classmethod
    def of(cls, selector: Selector, ratio: Ratio, reused: int) -> Budget:
        """The budget of a request.

        Args:
            selector: its :attr:`~Selector.fixed_ratio` takes precedence.
            ratio: the requested share, rounded up to whole rows.
            reused: reused rows of the request.
        """
        if selector.fixed_ratio is not None:
            ratio = selector.fixed_ratio
        low = AUTO_FLOOR if ratio == "auto" else ratio
        return cls(reused, *(min(reused, math.ceil(share * reused)) for share in (low, max_ratio(ratio))))

    @property
    def leaves_choice(self) -> bool:
        """Whether there is anything to rank: neither all rows are recomputed nor none."""
        return self.most > 0 and self.least < self.reused

    def count(self, score: torch.Tensor) -> int:
        """Rows to recompute.

        Between the bounds the scores decide: the geometric mean of the number of rows that cover :data:`AUTO_SHARE` of
        all scores and of :data:`AUTO_USUAL` of the rows. Concentrated attention is only weak evidence that few rows
        suffice, hence the mean.

        Args:
            score: float32 (reused,), not negative; read on the host only if the bounds differ.
        """
        if self.least == self.most:
            return self.least
        covered = score.double().sort(descending=True).values.cumsum(0)
        needed = 1 + int((covered < AUTO_SHARE * covered[-1]).sum())
        tempered = math.ceil(math.sqrt(needed * AUTO_USUAL * len(score)))
        return min(max(tempered, self.least), self.most)


def pick(
    selector: Selector,
    scores: Sequence[torch.Tensor],
    rows: Sequence[ReusedRows],
    budgets: Sequence[Budget],
    drift: DriftModel = DEFAULT,
) -> list[torch.Tensor]:
    """The rows to recompute, of several requests with equal selectors.

    Args:
        selector: selects the rows.
        scores: of each request, float32 (reused,), by the selector.
        rows: of each request, its reused rows.
        budgets: of each request, how many.
        drift: how the drift of the rows varies.

    Returns:
        Of each request, their prompt positions, int64, ascending.
    """
    counts = [budget.count(score) for budget, score in zip(budgets, scores, strict=True)]
    selected = selector.select(scores, rows, counts, drift)
    return [request.positions[indices].sort().values for request, indices in zip(rows, selected, strict=True)]
