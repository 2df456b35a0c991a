"""QCFuse: what the question attends to in three middle layers, seen through anchors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import ProbeLayers, ReusedRows, Selector


@dataclass(frozen=True)
class QCFuse(Selector):
    """The rows with the most of the question's attention in three middle layers; the question sees a tenth of them.

    QCFuse (arXiv 2606.05875 and its authors' code): the question runs over a tenth of each chunk's rows, its anchors,
    and over the whole system prompt. In three critical layers its queries are compared with the keys of all rows, and
    the attention is averaged over its rows, heads and these layers. One set of rows is recomputed in all layers. The
    default ratio of the code is 0.5; here the ratio decides.

    Two things differ, because the authors prepare them offline. They rank layers on each model by a profile; of the
    four models that they publish, the first three layers are between 0.41 and 0.65 of the depth, and here it is the
    three layers from the middle on. They choose anchors by KVzip, which has the model repeat each chunk. KV that
    any request may have left has no offline stage, so here the keys with the smallest norm are the anchors.
    """

    needs = ProbeLayers(0.5, 0.5, least=3, mean=True, anchors=0.1)
    supports_auto: ClassVar[bool] = True

    def score(self, signal: torch.Tensor, rows: ReusedRows) -> torch.Tensor:
        return signal[rows.positions]
