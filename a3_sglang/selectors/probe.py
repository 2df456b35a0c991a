"""The question probe: recompute what the question attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.drift.model import DriftModel
from a3_sglang.drift.selection import select_batch
from a3_sglang.selectors.base import Need, ProbeLayers, ReusedRows, Selector

MIDDLE_LAYERS = ProbeLayers(0.25, 0.8)


@dataclass(frozen=True)
class Probe(Selector):
    """Recompute the rows that leave the least drift in what the question attends to.

    The weight of a row's drift is the question's attention to it over the reused KV at true positions, summed over
    layers: its root mean square over the question's rows, times the norm of the row's value
    (:func:`a3_sglang.attention.relevance.relevance`). With these weights, rows are chosen by the model of
    :mod:`a3_sglang.drift`: rows near the beginning of a span drift most, and a row whose neighbours are recomputed can
    wait, because its drift is predicted from theirs and corrected without a recompute.

    Related: ProphetKV (arXiv 2602.02579) takes the mean over all layers, InfoFlow KV (arXiv 2603.05353) late ones;
    A3 (arXiv 2511.17560, Section 4) scores fresh keys of layer 1 only.

    Attributes:
        needs: the band of layers.
    """

    needs: Need = MIDDLE_LAYERS
    supports_auto: ClassVar[bool] = True
    corrects_drift: ClassVar[bool] = True

    def score(self, signal: torch.Tensor, rows: ReusedRows) -> torch.Tensor:
        return signal[rows.positions]

    def select(
        self, scores: Sequence[torch.Tensor], rows: Sequence[ReusedRows], counts: Sequence[int], drift: DriftModel
    ) -> list[torch.Tensor]:
        return select_batch(drift, [score.float() for score in scores], [request.lengths for request in rows], counts)
