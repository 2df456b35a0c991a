"""The interface of a selector: the rule that ranks the reused rows of one request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from a3_sglang.drift.model import DriftModel


@dataclass(frozen=True, slots=True)
class ReusedRows:
    """The reused rows of one request, span after span.

    Attributes:
        positions: int64 (reused,), ascending prompt positions.
        offsets: int64 (reused,), distance of each row from the beginning of its span.
        lengths: rows of each span.
    """

    positions: torch.Tensor
    offsets: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int]], device: Any) -> ReusedRows:
        """The rows of spans ``[start, end)``, ascending."""
        none = torch.arange(0, device=device)
        positions = [torch.arange(start, end, device=device) for start, end in spans]
        offsets = [torch.arange(end - start, device=device) for start, end in spans]
        return cls(torch.cat([none, *positions]), torch.cat([none, *offsets]), tuple(map(len, offsets)))


@dataclass(frozen=True, slots=True)
class ProbeLayers:
    """Need of a selector: the question's attention over the reused KV, in all layers or a band of them.

    Its signal is float32 (context,), one value per prompt position before the tail: the relevance of the position
    (:func:`a3_sglang.attention.relevance.relevance`) summed over the band; zero in gaps, which have no KV yet.

    Attributes:
        first, last: the band, as shares of the model's depth; by default all layers.
        least: fewest layers in the band, if the model has as many from the band's first on.
        mean: relevance is the mean of the attention of the question's rows, the values left aside.
        anchors: share of each span's rows that the question's rows attend to, those whose keys in the band have the
            smallest norm (arXiv 2406.11430); they attend to the whole prefix, too. Only their attention in the band is
            measured over all rows.
    """

    first: float = 0.0
    last: float = 1.0
    least: int = 1
    mean: bool = False
    anchors: float = 1.0

    def layers(self, windows: Sequence[int | None]) -> tuple[int, ...]:
        """The layers of the band, at least one, ascending.

        Layers with a sliding window are left out if the band has others: from the end of a prompt they see little of
        it.

        Args:
            windows: of each layer of the model; None if it attends to all positions.
        """
        depth = len(windows)
        begin = int(self.first * depth)
        band = range(begin, min(max(begin + self.least, int(self.last * depth)), depth))
        return tuple(layer for layer in band if windows[layer] is None) or tuple(band)


@dataclass(frozen=True, slots=True)
class DenseLayers:
    """Need of a selector: the first layers, computed for all rows after the exact prefix.

    Its signal is a :class:`DenseLayer`, the last of them.

    Attributes:
        count: number of layers.
    """

    count: int


Need = ProbeLayers | DenseLayers | None
"""What is measured before the rows of a request are ranked; None: nothing, and the signal is None."""


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """One layer of one request, computed for all rows after the exact prefix: first the context, then the tail.

    Attributes:
        query: (tail, heads, head_dim), after RoPE.
        key: (context + tail, kv_heads, head_dim), after RoPE.
        value: like ``key``.
        copied: (context, kv_heads, head_dim), the values that were copied; arbitrary in gaps.
        reused: int64 (reused,), ascending; which rows of the context are reused.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    copied: torch.Tensor
    reused: torch.Tensor


class Selector(ABC):
    """Ranks reused rows; the executor recomputes those that rank highest, as many as the budget allows.

    A subclass is a frozen dataclass of its options. It sees tensors only, nothing of SGLang. The class attributes say
    what it needs and what may be done with it; :meth:`score` is all it has to define.
    """

    needs: Need = None
    """What is measured for :meth:`score`."""
    supports_auto: ClassVar[bool] = False
    """Whether scores are shares of the question's attention, which the budget of ``ratio="auto"`` assumes."""
    corrects_drift: ClassVar[bool] = False
    """Whether the reused rows between the recomputed ones are corrected, too; see :mod:`a3_sglang.drift`."""
    fixed_ratio: ClassVar[float | None] = None
    """The ratio of a selector that ignores the requested one."""

    @abstractmethod
    def score(self, signal: Any, rows: ReusedRows) -> torch.Tensor:
        """How much each reused row deserves to be recomputed.

        Args:
            signal: what was measured, as :attr:`needs` asks for: see :class:`ProbeLayers` and :class:`DenseLayers`;
                None if nothing is needed.
            rows: the reused rows.

        Returns:
            float32 (reused,), not negative if :attr:`supports_auto` is set.
        """

    def select(
        self, scores: Sequence[torch.Tensor], rows: Sequence[ReusedRows], counts: Sequence[int], drift: DriftModel
    ) -> list[torch.Tensor]:
        """Which rows of each request to recompute: those with the highest scores; of equal ones, the earlier.

        All requests of a batch come in one call, so a rule with many kernel launches makes them only once.

        Args:
            scores: of each request, what :meth:`score` returned.
            rows: of each request, its reused rows.
            counts: of each request, how many to choose.
            drift: how the drift of the rows varies.

        Returns:
            Of each request, int64 (count,), distinct indices into its rows, in any order.
        """
        return [
            score.sort(descending=True, stable=True).indices[:count]
            for score, count in zip(scores, counts, strict=True)
        ]
