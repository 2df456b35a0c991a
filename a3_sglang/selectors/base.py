"""What a selector is: the rule that ranks the reused rows of one request."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch


class Selector(ABC):
    """Ranks reused rows; the executor recomputes those that rank highest, as many as the budget allows.

    A subclass is a frozen dataclass of its options. It sees tensors only, nothing of SGLang.
    """

    name: ClassVar[str]

    @abstractmethod
    def probe_layers(self, depth: int) -> range:
        """Layers whose question attention is wanted (contiguous; empty: the probe is not run).

        Args:
            depth: number of layers of the model.
        """

    def budget(self, ratio: float, reused: int) -> int:
        """How many of ``reused`` rows are recomputed."""
        return min(reused, math.ceil(ratio * reused))

    def pick(self, relevance: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
        """The ``count`` positions to recompute, ascending.

        Args:
            relevance: float32 (context,); what the probe measured for each prompt position before the tail.
            positions: int64 (reused,), ascending; the positions of reused rows.
            count: how many to pick.

        Returns:
            int64 (count,), ascending. Equal relevance goes to the earlier position.
        """
        order = torch.sort(relevance[positions], descending=True, stable=True).indices[:count]
        return positions[order].sort().values
