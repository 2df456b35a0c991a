"""What a selector is: the rule that ranks the reused rows of one request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

Ratio = float | Literal["auto"]
"""Share of the reused rows that is recomputed; ``"auto"`` lets the question's attention decide."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The reused rows of one request, span after span.

    Attributes:
        positions: int64 (reused,), ascending; where they stand in the prompt.
        offsets: int64 (reused,), how far each stands behind the beginning of its span.
        lengths: rows of each span.
    """

    positions: torch.Tensor
    offsets: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int]], device: Any) -> Rows:
        """The rows of spans ``[start, end)``, ascending."""
        none = torch.arange(0, device=device)
        positions = [torch.arange(start, end, device=device) for start, end in spans]
        offsets = [torch.arange(end - start, device=device) for start, end in spans]
        return cls(torch.cat([none, *positions]), torch.cat([none, *offsets]), tuple(map(len, offsets)))


@dataclass(frozen=True, slots=True)
class FreshLayer:
    """One layer of one request, computed for all rows behind the exact prefix: first the context, then the tail.

    Attributes:
        query: (tail, heads, head_dim), after RoPE.
        key: (context + tail, kv_heads, head_dim), after RoPE.
        value: like ``key``.
        copied: (context, kv_heads, head_dim), the values that were copied; arbitrary where nothing was reused.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    copied: torch.Tensor


class Selector:
    """Ranks reused rows; the executor recomputes those that rank highest, as many as the budget allows.

    A subclass is a frozen dataclass of its options. It sees tensors only, nothing of SGLang. What it ranks by is
    measured either by the probe (:meth:`probe_layers`) or on the first layers computed in full
    (:attr:`fresh_layers`, :meth:`measure`), or not at all.
    """

    name: ClassVar[str]
    fresh_layers: ClassVar[int] = 0
    """So many layers, from layer 0 on, are computed for all rows before any are chosen."""
    attention: ClassVar[bool] = False
    """Whether scores are shares of the question's attention, which ``ratio="auto"`` needs."""

    corrects_drift: ClassVar[bool] = False
    """Whether the rows between recomputed ones are corrected, too; see :mod:`a3_sglang.drift`."""

    def probe_layers(self, depth: int) -> range:
        """Layers whose question attention is wanted (contiguous; empty, the default: the probe is not run).

        Args:
            depth: number of layers of the model.
        """
        return range(0)

    def measure(self, layer: FreshLayer) -> torch.Tensor:
        """Relevance of the context's rows, float32 (context,), from the last of the :attr:`fresh_layers`."""
        raise NotImplementedError

    def budget(self, ratio: Ratio, reused: int) -> range:
        """How many of ``reused`` rows are recomputed, from the least to the most, one or more counts."""
        if ratio == "auto":
            return range(_rows(AUTO_FLOOR, reused), _rows(AUTO_CAP, reused) + 1)
        count = _rows(ratio, reused)
        return range(count, count + 1)

    def scores(self, relevance: torch.Tensor, rows: Rows) -> torch.Tensor:
        """How much each reused row deserves to be recomputed: what was measured for it, unless a rule knows better.

        Args:
            relevance: float32 (context,); what was measured for each prompt position before the tail, zero where
                nothing was.
            rows: the reused rows.

        Returns:
            float32 (reused,), not negative where :attr:`attention` is set.
        """
        return relevance[rows.positions]

    def pick(self, relevance: torch.Tensor, rows: Rows, budget: range) -> torch.Tensor:
        """Positions to recompute, int64, ascending.

        Where ``budget`` leaves a choice, attention decides: the geometric mean of as many as it takes to cover
        :data:`AUTO_SHARE` of all scores and of :data:`AUTO_USUAL`. Attention in few places tells only half that few
        rows will do.
        """
        scores = self.scores(relevance, rows)
        count = budget[0]
        if len(budget) > 1:
            covered = scores.double().sort(descending=True).values.cumsum(0)
            needed = 1 + int((covered < AUTO_SHARE * covered[-1]).sum())
            tempered = math.ceil(math.sqrt(needed * AUTO_USUAL * len(scores)))
            count = min(max(tempered, budget[0]), budget[-1])
        return rows.positions[self.choose(scores, rows, count)].sort().values

    def choose(self, scores: torch.Tensor, rows: Rows, count: int) -> torch.Tensor:
        """Indices of ``count`` rows, int64: those with the highest scores, of equal ones the earlier."""
        return scores.sort(descending=True, stable=True).indices[:count]


AUTO_SHARE, AUTO_USUAL, AUTO_FLOOR, AUTO_CAP = 0.7, 0.15, 0.05, 0.4
"""With ``ratio="auto"``: share of the scores to cover, and shares of the reused rows that the budget is drawn to and
bounded by."""


def _rows(ratio: float, reused: int) -> int:
    return min(reused, math.ceil(ratio * reused))
