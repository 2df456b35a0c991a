"""The question probe: recompute what the question attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.drift import Blocks, informative
from a3_sglang.selectors.base import Rows, Selector


@dataclass(frozen=True)
class Probe(Selector):
    """Recompute the rows after which the least drift is left in what the question attends to.

    What a row's drift matters is the question's attention to it over the reused KV at true positions, summed over
    layers, times how stale the row may be.

    Attention counts by its root mean square over the question's rows and by the size of the value it reads
    (``kernels/relevance.py``). The further a row stands behind the beginning of its span, the more of what it had
    seen when it was computed stands before it now as well, so the less a recompute changes it: its score is divided
    by ``sqrt(1 + offset / reach)``. Of these weights the budget makes the most by the model of ``drift.py``: rows
    whose neighbours tell about them already can wait, as their drift will be taken off without a recompute.

    Related: ProphetKV (arXiv 2602.02579) takes the mean over all layers, InfoFlow KV (arXiv 2603.05353) late ones;
    A3 (arXiv 2511.17560, Section 4) scores fresh keys of layer 1 only.

    Attributes:
        first, last: the band of layers, as shares of the model's depth.
        reach: tokens, see above.
    """

    name: ClassVar[str] = "probe"
    attention: ClassVar[bool] = True
    spreads: ClassVar[bool] = True
    first: float = 0.25
    last: float = 0.8
    reach: float = 256.0

    def probe_layers(self, depth: int) -> range:
        begin = int(self.first * depth)
        return range(begin, max(begin + 1, int(self.last * depth)))

    def scores(self, relevance: torch.Tensor, rows: Rows) -> torch.Tensor:
        return super().scores(relevance, rows) * torch.rsqrt(1 + rows.offsets / self.reach)

    def choose(self, scores: torch.Tensor, rows: Rows, count: int) -> torch.Tensor:
        return informative(scores.float(), Blocks(rows.lengths, scores.device), count)
