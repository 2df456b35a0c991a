"""Recompute everything: the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import ReusedRows, Selector


@dataclass(frozen=True)
class Full(Selector):
    """Recompute every reused row at any ratio: a full prefill by way of the fusion."""

    fixed_ratio: ClassVar[float | None] = 1.0

    def score(self, signal: None, rows: ReusedRows) -> torch.Tensor:
        return torch.zeros_like(rows.positions, dtype=torch.float32)
