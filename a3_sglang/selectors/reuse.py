"""No recompute at all: gaps only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a3_sglang.selectors.base import Selector


@dataclass(frozen=True)
class Reuse(Selector):
    """Keep every reused row as it is, whatever the ratio: the fastest and least exact choice."""

    name: ClassVar[str] = "reuse"

    def probe_layers(self, depth: int) -> range:
        return range(0)

    def budget(self, ratio: float, reused: int) -> int:
        return 0
