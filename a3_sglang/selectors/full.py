"""Recompute everything: the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from a3_sglang.selectors.base import Ratio, Selector


@dataclass(frozen=True)
class Full(Selector):
    """Recompute every reused row, whatever the ratio: a full prefill by way of the fusion."""

    name: ClassVar[str] = "full"

    def budget(self, ratio: Ratio, reused: int) -> range:
        return range(reused, reused + 1)
