"""ProphetKV: what the question attends to in all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import ProbeLayers, ReusedRows, Selector


@dataclass(frozen=True)
class ProphetKV(Selector):
    """The rows with the most of the question's attention, averaged over its rows, all heads and all layers.

    ProphetKV (arXiv 2602.02579) has two stages: the question runs over the reused KV through every layer, and the
    attention of all layers is fused into one ranking; then one set of rows is recomputed in all layers. The paper
    recomputes 20%; here the ratio decides. Left open by the paper, chosen here: the question is that of this package
    (:func:`a3_sglang.matching.plan.question_ranges`), and the softmax is over everything that the question sees, its
    own rows and the prefix included.
    """

    needs = ProbeLayers(mean=True)
    supports_auto: ClassVar[bool] = True

    def score(self, signal: torch.Tensor, rows: ReusedRows) -> torch.Tensor:
        return signal[rows.positions]
