"""The first rows of every span."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from a3_sglang.selectors.base import ReusedRows, Selector


@dataclass(frozen=True)
class Epic(Selector):
    """The same number of rows at the head of each span, whatever the question.

    LegoLink (EPIC, arXiv 2410.15332, Section 4). The paper fixes the number per chunk; here it follows from the ratio.
    """

    def score(self, signal: None, rows: ReusedRows) -> torch.Tensor:
        return -rows.offsets.to(torch.float32)
