"""CacheBlend: recompute what the context changes most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from a3_sglang.selectors.base import DenseLayer, DenseLayers, ReusedRows, Selector


@dataclass(frozen=True)
class CacheBlend(Selector):
    """Rows whose values at layer 1 differ most from the copied ones, whatever the question.

    CacheBlend (arXiv 2405.16444, Section 4), in the form of LMCache and of A3's authors: layers 0 and 1 are computed
    for all rows, and one choice at layer 1 holds for all later layers.
    """

    needs = DenseLayers(2)

    def score(self, signal: DenseLayer, rows: ReusedRows) -> torch.Tensor:
        context = len(signal.copied)
        change = (signal.value[:context].float() - signal.copied.float()).square().sum((1, 2))
        return change[signal.reused]
