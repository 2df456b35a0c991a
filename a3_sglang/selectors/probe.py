"""The question probe: recompute what the question attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import Rows, Selector


@dataclass(frozen=True)
class Probe(Selector):
    """Question attention over the reused KV at true positions, summed over a band of middle layers.

    Related: ProphetKV (arXiv 2602.02579) averages all layers, InfoFlow KV (arXiv 2603.05353) takes late ones;
    A3 (arXiv 2511.17560, Section 4) scores fresh keys of layer 1 only.

    Attributes:
        first, last: the band of layers, as shares of the model's depth.
    """

    name: ClassVar[str] = "probe"
    first: float = 0.4
    last: float = 0.7

    def probe_layers(self, depth: int) -> range:
        begin = int(self.first * depth)
        return range(begin, max(begin + 1, int(self.last * depth)))

    def scores(self, relevance: torch.Tensor, rows: Rows) -> torch.Tensor:
        return relevance[rows.positions]
