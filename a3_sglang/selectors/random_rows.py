"""Rows drawn at random: the baseline that any rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from a3_sglang.selectors.base import ReusedRows, Selector


@dataclass(frozen=True)
class Random(Selector):
    """Uniformly drawn rows; requests with the same number of reused rows get the same draw.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    def score(self, signal: None, rows: ReusedRows) -> torch.Tensor:
        # Drawn on the CPU, so that the draw is the same on every device.
        drawn = torch.rand(len(rows.positions), generator=torch.Generator().manual_seed(self.seed))
        return drawn.to(rows.positions.device)
