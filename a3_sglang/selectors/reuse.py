"""Recompute nothing: only gaps are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import ReusedRows, Selector


@dataclass(frozen=True)
class Reuse(Selector):
    """Keep every reused row as it is at any ratio: the fastest and least exact choice."""

    fixed_ratio: ClassVar[float | None] = 0.0

    def score(self, signal: None, rows: ReusedRows) -> torch.Tensor:
        return torch.zeros_like(rows.positions, dtype=torch.float32)
