"""What a selector is: the rule that ranks the reused rows of one request."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """The reused rows of one request.

    Attributes:
        positions: int64 (reused,), ascending; where they stand in the prompt.
        offsets: int64 (reused,), how far each stands behind the beginning of its span.
    """

    positions: torch.Tensor
    offsets: torch.Tensor


class Selector(ABC):
    """Ranks reused rows; the executor recomputes those that rank highest, as many as the budget allows.

    A subclass is a frozen dataclass of its options. It sees tensors only, nothing of SGLang.
    """

    name: ClassVar[str]

    def probe_layers(self, depth: int) -> range:
        """Layers whose question attention is wanted (contiguous; empty, the default: the probe is not run).

        Args:
            depth: number of layers of the model.
        """
        return range(0)

    def budget(self, ratio: float, reused: int) -> int:
        """How many of ``reused`` rows are recomputed."""
        return min(reused, math.ceil(ratio * reused))

    @abstractmethod
    def scores(self, relevance: torch.Tensor, rows: Rows) -> torch.Tensor:
        """How much each reused row deserves to be recomputed.

        Args:
            relevance: float32 (context,); what the probe measured for each prompt position before the tail, zero
                where it was not run.
            rows: the reused rows.

        Returns:
            float32 (reused,).
        """

    def pick(self, relevance: torch.Tensor, rows: Rows, count: int) -> torch.Tensor:
        """The ``count`` positions to recompute, int64 (count,), ascending; of equal scores the earlier position."""
        order = torch.sort(self.scores(relevance, rows), descending=True, stable=True).indices[:count]
        return rows.positions[order].sort().values
