"""The first rows of every span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import Rows, Selector


@dataclass(frozen=True)
class Epic(Selector):
    """As many rows at the head of each span, blind to the question: LegoLink (EPIC, arXiv 2410.15332, Section 4).

    The paper takes a fixed count a chunk; here the ratio decides how many, the same for every span.
    """

    name: ClassVar[str] = "epic"

    def scores(self, relevance: torch.Tensor, rows: Rows) -> torch.Tensor:
        return -rows.offsets.to(torch.float32)
