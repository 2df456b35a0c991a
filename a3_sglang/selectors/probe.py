"""The question probe: recompute what the question attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.drift.model import PaddedBlocks
from a3_sglang.drift.selection import select_a_optimal
from a3_sglang.selectors.base import Rows, Selector


@dataclass(frozen=True)
class Probe(Selector):
    """Recompute the rows after which the least drift is left in what the question attends to.

    What a row's drift matters is the question's attention to it over the reused KV at true positions, summed over
    layers: its root mean square over the question's rows, times the size of the value it reads
    (``attention/relevance.py``). With these weights the budget makes the most of the model of ``drift/model.py``: rows
    near the beginning of a span are stale most, and rows whose neighbours tell about them already can wait, as their
    drift will be taken off without a recompute.

    Related: ProphetKV (arXiv 2602.02579) takes the mean over all layers, InfoFlow KV (arXiv 2603.05353) late ones;
    A3 (arXiv 2511.17560, Section 4) scores fresh keys of layer 1 only.

    Attributes:
        first, last: the band of layers, as shares of the model's depth.
    """

    name: ClassVar[str] = "probe"
    attention: ClassVar[bool] = True
    corrects_drift: ClassVar[bool] = True
    first: float = 0.25
    last: float = 0.8

    def probe_layers(self, depth: int) -> range:
        begin = int(self.first * depth)
        return range(begin, max(begin + 1, int(self.last * depth)))

    def choose(self, scores: torch.Tensor, rows: Rows, count: int) -> torch.Tensor:
        return select_a_optimal(scores.float(), PaddedBlocks(rows.lengths, scores.device), count)
