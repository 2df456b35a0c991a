"""A3 as published: the question's attention at layer 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import DenseLayer, DenseLayers, ReusedRows, Selector


@dataclass(frozen=True)
class A3(Selector):
    """Attention-aware selection of A3 (arXiv 2511.17560, Section 4, and its authors' code).

    Layers 0 and 1 are computed for all rows. At layer 1 the tail's queries attend to the fresh keys after the exact
    prefix, the heads concatenated to one. Attention is summed over the tail's rows and averaged over neighbours.

    Attributes:
        pool: rows that are averaged, an odd number.
    """

    needs = DenseLayers(2)
    supports_auto: ClassVar[bool] = True
    pool: int = 5

    def score(self, signal: DenseLayer, rows: ReusedRows) -> torch.Tensor:
        tail, heads, dim = signal.query.shape
        total, kv_heads, _ = signal.key.shape
        context = total - tail
        # Heads of a group share their keys: the sum over heads is taken before the product.
        query = signal.query.float().view(tail, kv_heads, heads // kv_heads, dim).sum(2).flatten(1)
        logits = query @ signal.key.float().flatten(1).T * (heads * dim) ** -0.5
        later = torch.ones(tail, tail, dtype=torch.bool, device=logits.device).triu(1)
        logits[:, context:].masked_fill_(later, float("-inf"))
        attention = torch.softmax(logits, -1)[:, :context].sum(0)
        pooled = torch.nn.functional.avg_pool1d(attention.view(1, 1, -1), self.pool, 1, self.pool // 2).view(-1)
        return pooled[signal.reused]
