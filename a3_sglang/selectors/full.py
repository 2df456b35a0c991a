"""Recompute everything: the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import Ratio, Rows, Selector


@dataclass(frozen=True)
class Full(Selector):
    """Recompute every reused row, whatever the ratio: a full prefill by way of the fusion."""

    name: ClassVar[str] = "full"

    def budget(self, ratio: Ratio, reused: int) -> range:
        return range(reused, reused + 1)

    def scores(self, relevance: torch.Tensor, rows: Rows) -> torch.Tensor:
        return torch.zeros_like(rows.positions, dtype=torch.float32)
