"""A3 as published: the question's attention at layer 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import FreshLayer, Selector


@dataclass(frozen=True)
class A3(Selector):
    """Attention-aware selection of A3 (arXiv 2511.17560, Section 4, and its authors' code).

    Layers 0 and 1 are computed for all rows. At layer 1 the tail's queries attend to the fresh keys behind the exact
    prefix, the heads concatenated to one. Attention is summed over the tail's rows and averaged over neighbours.

    Attributes:
        pool: rows that are averaged, an odd number.
    """

    name: ClassVar[str] = "a3"
    fresh_layers: ClassVar[int] = 2
    attention: ClassVar[bool] = True
    pool: int = 5

    def measure(self, layer: FreshLayer) -> torch.Tensor:
        rows, heads, dim = layer.query.shape
        n, kv_heads, _ = layer.key.shape
        context = n - rows
        # Heads of a group share their keys: the sum over heads is taken before the product.
        query = layer.query.float().view(rows, kv_heads, heads // kv_heads, dim).sum(2).flatten(1)
        logits = query @ layer.key.float().flatten(1).T * (heads * dim) ** -0.5
        later = torch.ones(rows, rows, dtype=torch.bool, device=logits.device).triu(1)
        logits[:, context:].masked_fill_(later, float("-inf"))
        attention = torch.softmax(logits, -1)[:, :context].sum(0)
        return torch.nn.functional.avg_pool1d(attention.view(1, 1, -1), self.pool, 1, self.pool // 2).view(-1)
