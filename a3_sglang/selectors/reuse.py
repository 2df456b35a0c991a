"""No recompute at all: gaps only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a3_sglang.selectors.base import Ratio, Selector


@dataclass(frozen=True)
class Reuse(Selector):
    """Keep every reused row as it is, whatever the ratio: the fastest and least exact choice."""

    name: ClassVar[str] = "reuse"

    def budget(self, ratio: Ratio, reused: int) -> range:
        return range(1)
