"""CacheBlend: recompute what the context changes most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from a3_sglang.selectors.base import FreshLayer, Selector


@dataclass(frozen=True)
class CacheBlend(Selector):
    """Rows whose values at layer 1 differ most from the copied ones, blind to the question.

    CacheBlend (arXiv 2405.16444, Section 4), in the form of LMCache and of A3's authors: layers 0 and 1 are computed
    for all rows, and one choice at layer 1 holds for all layers behind it.
    """

    name: ClassVar[str] = "cacheblend"
    fresh_layers: ClassVar[int] = 2

    def measure(self, layer: FreshLayer) -> torch.Tensor:
        context = len(layer.copied)
        return (layer.value[:context].float() - layer.copied.float()).square().sum((1, 2))
