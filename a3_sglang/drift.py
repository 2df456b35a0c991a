"""Drift: which rows to recompute, and what these tell about the rows between them.

The KV of a span was computed behind another context. How far a row's copied KV is from what this prompt makes of it,
its *drift*, is much the same for rows near each other in one span: they miss the same context. So the drift of the
recomputed rows, known as soon as their fresh KV replaces the copied, predicts that of the rows between them, and is
taken off these at once, layer by layer, while the recomputed rows go through the model.

The prediction is simple kriging (Gaussian-process regression with mean zero): rows of one span correlate by their
distance, those of different spans do not, and a row far from every recomputed one stays nearly as it was copied. Keys
are compared as they were before RoPE.

The same model says which rows to recompute (:func:`informative`): those after which the question has the least to
lose, a row's own drift and that of its neighbours, which it helps to predict, together.
"""

from __future__ import annotations

import math
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
        """Correlation of rows at positions ``one`` (..., n) and ``other`` (..., m), float32 (..., n, m).

        The own part of a row with itself is left out.
        """
        distance = (one[..., :, None] - other[..., None, :]).abs().float()
        return self.span + self.far * (-distance / self.reach).exp() + self.near * (-distance / self.close).exp()

    @property
    def own(self) -> float:
        """Each row's own part."""
        return 1 - self.span - self.far - self.near

    def weights(self, known: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Weights that predict the drift at ``wanted`` positions from that at ``known`` ones.

        Returns:
            float32 (wanted, known).
        """
        among = self(known, known)
        among.diagonal().add_(self.own)
        return self.trust * torch.cholesky_solve(self(known, wanted), torch.linalg.cholesky(among)).T.contiguous()


KEYS = Correlation(span=0.2, far=0.25, reach=200, near=0.2, close=4, trust=0.85)
VALUES = Correlation(span=0.07, far=0.18, reach=150, near=0.2, close=4, trust=0.5)
"""Measured; see ``docs/quality.md``."""


ROUNDS = 16
"""In so many rounds :func:`informative` chooses; within one, rows do not know of each other."""
IN_PLAY = 2.5
"""Of every block it looks at so many times the share of rows that are wanted: those with the highest weights."""


def informative(weight: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    """The rows to know, so that the least of the others' drift stays unknown.

    Each round takes the rows whose drift of keys, once known, lowers the most the variance that is left, summed over
    rows times their weights: ``sum_j weight[j] cov(i, j)**2 / var(i)``, given the rows of the rounds before (greedy
    A-optimal design). Rows that others tell about already gain little, rows that tell about many gain more.

    Args:
        weight: float32 (n,), not negative; what a row's drift matters.
        offsets: int64 (n,), how far each row stands behind the beginning of its span; spans back to back, whole.
        count: rows to choose, at most n.

    Returns:
        int64 (count,), indices, in the order in which they were chosen.
    """
    rows, starts = torch.arange(len(offsets), device=offsets.device), offsets % BLOCK == 0
    block, at = starts.cumsum(0) - 1, offsets % BLOCK
    blocks, size = int(starts.sum()), min(int(offsets.max()) + 1, BLOCK)
    dense = weight.new_full((blocks, size), -1)
    dense[block, at] = weight
    width = min(size, math.ceil(IN_PLAY * count / len(offsets) * size))
    weights, play = (x[:, :width] for x in dense.sort(dim=1, descending=True, stable=True))
    number = rows.new_zeros(blocks, size).index_put_((block, at), rows).gather(1, play).flatten()
    taken, weights = (weights < 0).flatten(), weights.clamp(min=0)
    covariance = KEYS(play, play)
    chosen: list[torch.Tensor] = []
    for part in rows[:count].tensor_split(ROUNDS):
        spread = covariance.diagonal(dim1=1, dim2=2)
        told = (covariance.square() @ weights[..., None]).squeeze(-1) + KEYS.own * (KEYS.own + 2 * spread) * weights
        gain = (told / (spread + KEYS.own)).flatten().masked_fill(taken, -1)
        best = gain.sort(descending=True, stable=True).indices[: len(part)]
        chosen.append(number[best])
        # What is known has nothing left to gain.
        taken[best] = True
        weights.flatten()[best] = 0
        _know(covariance, best)
    return torch.cat(chosen)


def _know(covariance: torch.Tensor, known: torch.Tensor) -> None:
    """Condition (blocks, n, n) in place on the drift of some rows, numbered through all blocks."""
    blocks, width, _ = covariance.shape
    known = known.sort().values
    block = known // width
    counts = torch.bincount(block, minlength=blocks)
    slot = torch.arange(len(known), device=known.device) - (counts.cumsum(0) - counts)[block]
    # Blocks with fewer known rows than others are filled up with rows that tell nothing.
    row = known.new_zeros(blocks, int(counts.max()))
    real = torch.zeros_like(row, dtype=torch.bool)
    row[block, slot], real[block, slot] = known % width, True
    toward = covariance.gather(1, row[..., None].expand(-1, -1, width)) * real[..., None]
    among = toward.gather(2, row[:, None].expand(-1, row.shape[1], -1)) * real[:, None]
    among.diagonal(dim1=1, dim2=2).add_(torch.where(real, KEYS.own, 1.0))
    part = torch.linalg.solve_triangular(torch.linalg.cholesky(among), toward, upper=False)
    covariance.baddbmm_(part.transpose(1, 2), part, alpha=-1)


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
