"""Which rows to recompute, by the model of drift in ``drift/model.py``."""

from __future__ import annotations

import math

import torch

from a3_sglang.drift.model import KEYS, PaddedBlocks, cholesky_factor, known_first

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
        _condition(covariance, own, *known_first(known, len(part)))
    return torch.cat(chosen)


def _condition(covariance: torch.Tensor, own: torch.Tensor, columns: torch.Tensor, real: torch.Tensor) -> None:
    """Condition (blocks, n, n) in place on the drift of the rows in ``columns``, where they are ``real``."""
    toward = covariance.gather(1, columns[..., None].expand(-1, -1, covariance.shape[2])) * real[..., None]
    among = toward.gather(2, columns[:, None].expand(-1, columns.shape[1], -1)) * real[:, None]
    part = torch.linalg.solve_triangular(cholesky_factor(among, own.gather(1, columns), real), toward, upper=False)
    covariance.baddbmm_(part.transpose(1, 2), part, alpha=-1)
