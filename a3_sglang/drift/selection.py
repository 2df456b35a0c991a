"""Which rows to recompute, by the model of drift in ``drift/model.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from a3_sglang.drift.model import DriftModel, PaddedBlocks, cholesky_factor, cut_blocks, observed_first
from a3_sglang.drift.tables import covariance_table

ROUNDS = 16
"""Greedy rounds. Rows picked in one round are scored independently of each other."""
CANDIDATE_FACTOR = 2.5
"""Candidates per block, as a multiple of its share of the budget: the rows with the largest weight x prior variance."""


def candidates_per_block(blocks: PaddedBlocks, count: int) -> int:
    """Upper bound of the rows per block that :func:`select_a_optimal` picks if it picks ``count`` in all."""
    return _most_candidates(blocks.shape[1], len(blocks.cell), count)


def most_candidates(lengths: Sequence[int], count: int) -> int:
    """:func:`candidates_per_block` of spans with this many rows each."""
    return _most_candidates(max((rows for _, rows in cut_blocks(lengths)), default=0), sum(lengths), count)


def _most_candidates(size: int, rows: int, count: int) -> int:
    return min(size, math.ceil(CANDIDATE_FACTOR * count / max(1, rows) * size))


def rows_per_round(count: int) -> list[int]:
    """How many rows each round picks if there are ``count`` to pick."""
    rounds = max(1, min(ROUNDS, count))
    return [count // rounds + (i < count % rounds) for i in range(rounds)]


def select_batch(
    drift: DriftModel, weights: Sequence[torch.Tensor], lengths: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[torch.Tensor]:
    """:func:`select_a_optimal` for several requests; on a GPU in as many launches as for one of them.

    Args:
        drift: how the drift of rows varies.
        weights: of each request.
        lengths: of each request, rows of its spans.
        counts: rows to pick, of each request.

    Returns:
        Of each request, int64 (count,), ordinals among its reused rows, in any order.
    """
    if weights[0].is_cpu:
        each = zip(weights, lengths, counts, strict=True)
        return [
            select_a_optimal(drift, weight, PaddedBlocks(spans, weight.device), count) for weight, spans, count in each
        ]
    return select_by_kernels(drift, weights, lengths, counts)


def select_by_kernels(
    drift: DriftModel, weights: Sequence[torch.Tensor], lengths: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[torch.Tensor]:
    """:func:`select_batch` by the kernels in ``kernels/``; forces no host-device sync."""
    if not sum(counts):
        return [torch.empty(0, dtype=torch.int64, device=weight.device) for weight in weights]
    from a3_sglang.kernels.drift_selection import BlockTable, select_rows

    entries, first, row = [], [], 0
    for spans, count in zip(lengths, counts, strict=True):
        first.append(row)
        rows, most = sum(spans), most_candidates(spans, count)
        for offset, size in cut_blocks(spans):
            entries.append((first[-1], rows, row, size, offset, most))
            row += size
    table = BlockTable(entries, [len(cut_blocks(spans)) for spans in lengths])
    covariance = covariance_table(drift.keys, max(map(max, lengths)), weights[0].device)
    selected = select_rows(torch.cat(list(weights)), table, [rows_per_round(count) for count in counts], covariance)
    return [part - begin for part, begin in zip(selected.split(list(counts)), first, strict=True)]


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
    for most in rows_per_round(count):
        variance = covariance.diagonal(dim1=1, dim2=2)
        # (variance + nugget)**2 of the row itself, of which the sum over all rows has only variance**2.
        own = nugget * (nugget + 2 * variance) * weights
        explained = (covariance.square() @ weights[..., None]).squeeze(-1) + own
        gain = (explained / (variance + nugget)).flatten().masked_fill(picked, -1)
        best = gain.sort(descending=True, stable=True).indices[:most]
        selected.append(reused_idx[best])
        # An observed row has no variance left, so its weight gains nothing.
        picked.index_fill_(0, best, True)
        weights.view(-1).index_fill_(0, best, 0)
        observed = torch.zeros_like(picked).index_fill_(0, best, True).view(candidates.shape)
        _condition(covariance, nugget, *observed_first(observed, most))
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
