"""Which rows to recompute, by the model of drift in ``drift/model.py``."""

from __future__ import annotations

import math

import torch

from a3_sglang.drift.model import DriftModel, PaddedBlocks, cholesky_factor, observed_first

ROUNDS = 16
"""Greedy rounds. Rows picked in one round are scored independently of each other."""
CANDIDATE_FACTOR = 2.5
"""Candidates per block, as a multiple of its share of the budget: the rows with the largest weight x prior variance."""


def candidates_per_block(blocks: PaddedBlocks, count: int) -> int:
    """Upper bound of the rows per block that :func:`select_a_optimal` picks if it picks ``count`` in all."""
    return min(blocks.shape[1], math.ceil(CANDIDATE_FACTOR * count / max(1, len(blocks.cell)) * blocks.shape[1]))


def select_a_optimal(drift: DriftModel, weight: torch.Tensor, blocks: PaddedBlocks, count: int) -> torch.Tensor:
    """Pick the rows whose recompute most reduces the weighted posterior variance of the drift of keys.

    Greedy A-optimal design: each round picks the rows i with the largest gain
    ``sum_j weight[j] cov(i, j)**2 / var(i)``, conditioned on the rows of the rounds before. Rows that others already
    predict well gain little, rows that predict many others gain more.

    Args:
        drift: how the drift of the rows varies.
        weight: float32 (reused,), not negative; how much a row's drift matters.
        blocks: of the reused rows; rows of different blocks are independent.
        count: rows to pick, at most ``reused``.

    Returns:
        int64 (count,), ordinals among the reused rows, in the order in which they were picked.
    """
    weights = blocks.pad(weight / weight.max().clamp(min=torch.finfo(weight.dtype).tiny), -1)
    prior = weights * drift.keys.variance(blocks.offsets)
    candidates = prior.sort(dim=1, descending=True, stable=True).indices[:, : candidates_per_block(blocks, count)]
    ordinals = torch.arange(len(weight), device=weight.device)
    reused_idx = blocks.pad(ordinals, 0).gather(1, candidates).flatten()
    weights, offsets = weights.gather(1, candidates), blocks.offsets.gather(1, candidates)
    # Cells without a row have weight -1 and count as picked.
    picked, weights = (weights < 0).flatten(), weights.clamp(min=0)
    covariance, nugget = drift.keys(offsets, offsets), drift.keys.nugget(offsets)
    selected: list[torch.Tensor] = []
    for chunk in torch.arange(count).tensor_split(max(1, min(ROUNDS, count))):
        variance = covariance.diagonal(dim1=1, dim2=2)
        # (variance + nugget)**2 of the row itself, of which the sum over all rows has only variance**2.
        own = nugget * (nugget + 2 * variance) * weights
        explained = (covariance.square() @ weights[..., None]).squeeze(-1) + own
        gain = (explained / (variance + nugget)).flatten().masked_fill(picked, -1)
        best = gain.sort(descending=True, stable=True).indices[: len(chunk)]
        selected.append(reused_idx[best])
        # An observed row has no variance left, so its weight gains nothing.
        picked.index_fill_(0, best, True)
        weights.view(-1).index_fill_(0, best, 0)
        observed = torch.zeros_like(picked).index_fill_(0, best, True).view(candidates.shape)
        _condition(covariance, nugget, *observed_first(observed, len(chunk)))
    return torch.cat(selected)


def _condition(
    covariance: torch.Tensor, nugget: torch.Tensor, columns: torch.Tensor, is_observed: torch.Tensor
) -> None:
    """Condition (blocks, n, n) in place on the drift of the rows in ``columns`` that are observed."""
    cross = covariance.gather(1, columns[..., None].expand(-1, -1, covariance.shape[2])) * is_observed[..., None]
    among = cross.gather(2, columns[:, None].expand(-1, columns.shape[1], -1)) * is_observed[:, None]
    factor = cholesky_factor(among, nugget.gather(1, columns), is_observed)
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    covariance.baddbmm_(half.transpose(1, 2), half, alpha=-1)
