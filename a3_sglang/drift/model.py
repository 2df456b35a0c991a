"""Drift: which rows to recompute, and what these tell about the rows between them.

The KV of a span was computed behind another context. How far a row's copied KV is from what this prompt makes of it,
its *drift*, is much the same for rows near each other in one span: they miss the same context. So the drift of the
recomputed rows, known as soon as their fresh KV replaces the copied, predicts that of the rows between them, and is
taken off these at once, layer by layer, while the recomputed rows go through the model.

The prediction is simple kriging (Gaussian-process regression with mean zero): rows of one span vary together by their
distance, those of different spans do not, and a row far from every recomputed one stays nearly as it was copied. Keys
are compared as they were before RoPE.

The same model says which rows to recompute (:func:`select_a_optimal`): those after which the question has the least to
lose, a row's own drift and that of its neighbours, which it helps to predict, together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 512
"""Rows of a span that tell about each other, at most; bounds the systems to solve."""


@dataclass(frozen=True)
class Covariance:
    """How the drift of two rows of one span varies together, by their offsets from the span's beginning.

    A row drifts more the nearer it stands to the beginning of its span, where most of what it had seen was another
    context; but the part of the drift that it shares with far rows does not grow with that. In units of the variance
    some way into a span.

    Attributes:
        common, reach: a part alike in the span's rows, whose covariance falls off as ``exp(-distance / reach)``.
        near, close: another of close neighbours, times the :meth:`scale` of both, as ``exp(-distance / close)``.
        trust: share of a prediction that is applied. That answers are better with less than 1 is measured, not
            derived: what a recompute shows is not all drift, as the recomputed rows attend to stale ones.
    """

    common: float
    reach: float
    near: float
    close: float
    trust: float

    def scale(self, offset: torch.Tensor) -> torch.Tensor:
        """How much larger than some way into a span the part is that is not common (standard deviation)."""
        variance = AT_BEGINNING * (1 + offset.float()) ** -FALL
        return ((variance - self.common) / (1 - self.common)).clamp(min=DEEP).sqrt()

    def own(self, offset: torch.Tensor) -> torch.Tensor:
        """Variance of the part that a row shares with none."""
        return (1 - self.common - self.near) * self.scale(offset).square()

    def variance(self, offset: torch.Tensor) -> torch.Tensor:
        """Of all parts together."""
        return self.common + (1 - self.common) * self.scale(offset).square()

    def __call__(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Covariance of rows at offsets ``one`` (..., n) and ``other`` (..., m), float32 (..., n, m).

        The own part of a row with itself is left out.
        """
        distance = (one[..., :, None] - other[..., None, :]).abs().float()
        near = self.near * self.scale(one)[..., :, None] * self.scale(other)[..., None, :]
        return self.common * (-distance / self.reach).exp() + near * (-distance / self.close).exp()


AT_BEGINNING, FALL, DEEP = 6.5, 0.38, 0.5
"""Variance of the drift at offset 0, the power of ``1 + offset`` by which it falls, and what stays of its scale."""
KEYS = Covariance(common=0.36, reach=300, near=0.27, close=5, trust=0.85)
VALUES = Covariance(common=0.28, reach=220, near=0.22, close=4, trust=0.5)
"""Fitted to harvested and compiled donors alike; ``benchmarks/drift.py`` prints both beside it."""


class PaddedBlocks:
    """Rows of spans in blocks of at most :data:`BLOCK`, padded to the length of the longest.

    All sizes are known on the host, so nothing here waits for a device.

    Args:
        lengths: rows of each span; the rows of all spans are numbered through.
        device: where the rows' tensors lie.

    Attributes:
        shape: (blocks, size).
        place: int64 (rows,), where each row stands in a flattened (blocks, size).
        offsets: int64 (blocks, size), how far behind the beginning of its span each row stands.
    """

    def __init__(self, lengths: Sequence[int], device: Any) -> None:
        cut = [(at, min(BLOCK, length - at)) for length in lengths for at in range(0, length, BLOCK)]
        size = max((count for _, count in cut), default=0)
        self.shape = len(cut), size
        # A small table, which a device takes without being waited for; what is large is made there.
        table = torch.tensor(cut, dtype=torch.int64).view(-1, 2).to(device, non_blocking=True)
        begins, counts = table.unbind(1)
        shifts = torch.arange(len(cut), device=device) * size - counts.cumsum(0) + counts
        rows = sum(count for _, count in cut)
        self.place = torch.arange(rows, device=device) + shifts.repeat_interleave(counts, output_size=rows)
        self.offsets = begins[:, None] + torch.arange(size, device=device)

    def spread(self, of_rows: torch.Tensor, other: float) -> torch.Tensor:
        """Something of all rows as (blocks, size), with ``other`` where there is none."""
        return (
            of_rows.new_full((self.shape[0] * self.shape[1],), other)
            .index_copy_(0, self.place, of_rows)
            .view(self.shape)
        )


ROUNDS = 16
"""In so many rounds :func:`select_a_optimal` chooses; within one, rows do not know of each other."""
CANDIDATE_FACTOR = 2.5
"""Of every block it looks at so many times the share of rows that are wanted: those with the highest weight times
variance."""


def candidates_per_block(blocks: PaddedBlocks, count: int) -> int:
    """How many rows of a block :func:`select_a_optimal` chooses at most, where it chooses ``count`` of all."""
    return min(blocks.shape[1], math.ceil(CANDIDATE_FACTOR * count / max(1, len(blocks.place)) * blocks.shape[1]))


def select_a_optimal(weight: torch.Tensor, blocks: PaddedBlocks, count: int) -> torch.Tensor:
    """The rows to know, so that the least of the others' drift stays unknown.

    Each round takes the rows whose drift of keys, once known, lowers the most the variance that is left, summed over
    rows times their weights: ``sum_j weight[j] cov(i, j)**2 / var(i)``, given the rows of the rounds before (greedy
    A-optimal design). Rows that others tell about already gain little, rows that tell about many gain more.

    Args:
        weight: float32 (n,), not negative; what a row's drift matters.
        blocks: of the n rows; rows of different blocks tell nothing about each other.
        count: rows to choose, at most n.

    Returns:
        int64 (count,), indices, in the order in which they were chosen.
    """
    weights = blocks.spread(weight / weight.max().clamp(min=torch.finfo(weight.dtype).tiny), -1)
    worth = weights * KEYS.variance(blocks.offsets)
    play = worth.sort(dim=1, descending=True, stable=True).indices[:, : candidates_per_block(blocks, count)]
    number = blocks.spread(torch.arange(len(weight), device=weight.device), 0).gather(1, play).flatten()
    weights, offsets = weights.gather(1, play), blocks.offsets.gather(1, play)
    taken, weights = (weights < 0).flatten(), weights.clamp(min=0)
    covariance, own = KEYS(offsets, offsets), KEYS.own(offsets)
    chosen: list[torch.Tensor] = []
    for part in torch.arange(count).tensor_split(max(1, min(ROUNDS, count))):
        spread = covariance.diagonal(dim1=1, dim2=2)
        told = (covariance.square() @ weights[..., None]).squeeze(-1) + own * (own + 2 * spread) * weights
        gain = (told / (spread + own)).flatten().masked_fill(taken, -1)
        best = gain.sort(descending=True, stable=True).indices[: len(part)]
        chosen.append(number[best])
        # What is known has nothing left to gain.
        taken.index_fill_(0, best, True)
        weights.view(-1).index_fill_(0, best, 0)
        known = torch.zeros_like(taken).index_fill_(0, best, True).view(play.shape)
        _condition(covariance, own, *_known_first(known, len(part)))
    return torch.cat(chosen)


def _known_first(known: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the known rows of each block, and which of them are real, both (blocks, width).

    Args:
        known: bool (blocks, size).
        most: rows known in a block, at most. A device is not asked how many there are; a CPU is, which saves work.
    """
    most = min(most, known.shape[1])
    if known.device.type == "cpu":
        most = int(known.sum(1).max()) if len(known) else 0
    real, columns = (x[:, :most] for x in known.sort(dim=1, descending=True, stable=True))
    return columns, real


def _condition(covariance: torch.Tensor, own: torch.Tensor, columns: torch.Tensor, real: torch.Tensor) -> None:
    """Condition (blocks, n, n) in place on the drift of the rows in ``columns``, where they are ``real``."""
    toward = covariance.gather(1, columns[..., None].expand(-1, -1, covariance.shape[2])) * real[..., None]
    among = toward.gather(2, columns[:, None].expand(-1, columns.shape[1], -1)) * real[:, None]
    part = torch.linalg.solve_triangular(_factor(among, own.gather(1, columns), real), toward, upper=False)
    covariance.baddbmm_(part.transpose(1, 2), part, alpha=-1)


def _factor(among: torch.Tensor, own: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of the known rows' covariance, their own parts added; columns that are not real stand alone."""
    among.diagonal(dim1=1, dim2=2).add_(own.where(real, 1.0))
    # Without looking whether it worked, which would wait for the device: the own parts keep it positive definite.
    return torch.linalg.cholesky_ex(among).L


class DriftPredictor:
    """Predicts the drift of all rows of some spans from that of a few.

    Args:
        known: int64 (n,), ascending numbers of the recomputed rows; ``len(blocks.place)`` stands for none of the rows.
        blocks: of all rows.
        most: how many rows of a block are known at most.
        wanted: bool (rows,), which rows are predicted at all.

    Attributes:
        keys, values: float32 (blocks, size, width), what each row takes from its block's known ones.
        source: int64 (blocks, width), which of ``known`` these are; any where the weights are zero.
        number: int64 (blocks, size), the rows' numbers, -1 where there is none.
    """

    def __init__(
        self, known: torch.Tensor, blocks: PaddedBlocks, most: int, wanted: torch.Tensor | None = None
    ) -> None:
        self._place, count = blocks.place, len(blocks.place)
        numbers = torch.arange(count + 1, device=known.device)
        mask = torch.zeros_like(numbers, dtype=torch.bool).index_fill_(0, known, True)
        columns, real = _known_first(blocks.spread(mask[:count], False), most)
        order = torch.zeros_like(numbers).index_copy_(0, known, torch.arange(len(known), device=known.device))
        self.source = blocks.spread(order[:count], 0).gather(1, columns)
        self.number = blocks.spread(numbers[:count], -1)
        self.keys, self.values = (_weights(kind, columns, real, blocks.offsets) for kind in (KEYS, VALUES))
        if wanted is not None:
            unwanted = ~blocks.spread(wanted, False)[..., None]
            self.keys, self.values = (weights.masked_fill(unwanted, 0) for weights in (self.keys, self.values))

    def of_keys(self, drift: torch.Tensor) -> torch.Tensor:
        """Predicted drift of all rows, (rows, heads, head_dim), from the known rows' (n, heads, head_dim).

        In the dtype of ``drift``. Zero in blocks where nothing is known; of the known rows it is not their own.
        """
        return self._predict(drift, self.keys)

    def of_values(self, drift: torch.Tensor) -> torch.Tensor:
        """Like :meth:`of_keys`."""
        return self._predict(drift, self.values)

    def _predict(self, drift: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not len(drift):
            return drift.new_zeros(len(self._place), *drift.shape[1:])
        predicted = torch.bmm(weights.to(drift.dtype), drift.flatten(1)[self.source])
        return predicted.flatten(0, 1).index_select(0, self._place).view(-1, *drift.shape[1:])


def _weights(kind: Covariance, columns: torch.Tensor, real: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Weights that predict every row of a block from its known ones, float32 (blocks, size, known)."""
    known = offsets.gather(1, columns)
    among = kind(known, known) * (real[:, :, None] & real[:, None, :])
    toward = kind(known, offsets) * real[..., None]
    factor = _factor(among, kind.own(known), real)
    # Two batched solves: on CUDA `cholesky_solve` takes one block after the other.
    half = torch.linalg.solve_triangular(factor, toward, upper=False)
    return kind.trust * torch.linalg.solve_triangular(factor.mT, half, upper=True).transpose(1, 2)
