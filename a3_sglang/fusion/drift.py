"""What recomputed rows tell about the rows between them.

The KV of a span was computed behind another context. How far a row's copied KV is from what this prompt makes of it,
its *drift*, is much the same for rows near each other in one span: they miss the same context. So the drift of the
recomputed rows, known as soon as their fresh KV replaces the copied, predicts that of the rows between them, and is
taken off these at once, layer by layer, while the recomputed rows go through the model.

The prediction is simple kriging (Gaussian-process regression with mean zero): rows of one span correlate by their
distance, those of different spans do not, and a row far from every recomputed one stays nearly as it was copied. Keys
are compared as they were before RoPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

BLOCK = 512
"""Rows of a span that tell about each other, at most; bounds the systems to solve."""


@dataclass(frozen=True)
class Correlation:
    """How the drift of two rows of one span correlates, by their distance in tokens.

    Shares of the drift's variance; what they leave of 1 is each row's own.

    Attributes:
        span: common to the whole span.
        far, reach: a part that falls off as ``exp(-distance / reach)``.
        near, close: another, of close neighbours, that falls off as ``exp(-distance / close)``.
        trust: share of a prediction that is applied. Recomputed rows are chosen, not drawn: those that a question
            looks at drift more than others.
    """

    span: float
    far: float
    reach: float
    near: float
    close: float
    trust: float

    def __call__(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Correlation of rows at positions ``one`` (n,) and ``other`` (m,) without the own part, float32 (n, m)."""
        distance = (one[:, None] - other).abs().float()
        return self.span + self.far * (-distance / self.reach).exp() + self.near * (-distance / self.close).exp()

    def weights(self, known: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Weights that predict the drift at ``wanted`` positions from that at ``known`` ones.

        Returns:
            float32 (wanted, known).
        """
        among = self(known, known)
        among.diagonal().add_(1 - self.span - self.far - self.near)
        return self.trust * torch.cholesky_solve(self(known, wanted), torch.linalg.cholesky(among)).T.contiguous()


KEYS = Correlation(span=0.2, far=0.25, reach=200, near=0.2, close=4, trust=0.7)
VALUES = Correlation(span=0.07, far=0.18, reach=150, near=0.2, close=4, trust=0.4)
"""Measured; see ``docs/quality.md``."""


@dataclass(frozen=True, slots=True)
class _Block:
    known: slice
    wanted: slice
    keys: torch.Tensor
    values: torch.Tensor


class Drift:
    """Predicts the drift of some rows of a request from that of others.

    Args:
        known: int64 (n,), ascending positions of recomputed rows.
        wanted: int64 (m,), ascending positions of the rows to predict.
        starts: ascending positions at which blocks begin; rows of different blocks tell nothing about each other.
    """

    def __init__(self, known: torch.Tensor, wanted: torch.Tensor, starts: Sequence[int]) -> None:
        cuts = torch.tensor(starts, dtype=known.dtype, device=known.device)
        edges = zip(
            *(pairwise([*torch.searchsorted(rows, cuts).tolist(), len(rows)]) for rows in (known, wanted)), strict=True
        )
        self._size = len(wanted)
        self._blocks = [
            _Block(
                slice(*a), slice(*b), *(kind.weights(known[slice(*a)], wanted[slice(*b)]) for kind in (KEYS, VALUES))
            )
            for a, b in edges
            if a[0] < a[1] and b[0] < b[1]
        ]

    def of_keys(self, drift: torch.Tensor) -> torch.Tensor:
        """Predicted drift, float32 (m, heads, head_dim), from the known rows' (n, heads, head_dim).

        Zero in blocks where nothing is known.
        """
        return self._predict(drift, [block.keys for block in self._blocks])

    def of_values(self, drift: torch.Tensor) -> torch.Tensor:
        """Like :meth:`of_keys`."""
        return self._predict(drift, [block.values for block in self._blocks])

    def _predict(self, drift: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        out = drift.new_zeros(self._size, *drift.shape[1:])
        for block, weight in zip(self._blocks, weights, strict=True):
            out[block.wanted] = (weight @ drift[block.known].flatten(1)).view(-1, *drift.shape[1:])
        return out
