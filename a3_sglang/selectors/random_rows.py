"""Rows drawn at random: what any rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import Rows, Selector


@dataclass(frozen=True)
class Random(Selector):
    """Uniformly drawn rows; equally many rows give the same draw.

    Attributes:
        seed: of the draw.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def scores(self, relevance: torch.Tensor, rows: Rows) -> torch.Tensor:
        # Drawn on the CPU, so that a device does not change the draw.
        drawn = torch.rand(len(rows.positions), generator=torch.Generator().manual_seed(self.seed))
        return drawn.to(rows.positions.device)
