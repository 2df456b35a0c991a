"""Parts that the kernels of drift share: the covariance of rows, a small inverse.

Blocks are those of :mod:`a3_sglang.drift.model`: runs of a span's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

PIVOTS = 16
"""Rows that are eliminated at once: the smallest matrix product."""


@dataclass(frozen=True, slots=True)
class CovarianceTable:
    """A :class:`a3_sglang.drift.model.Covariance` as kernels take it.

    Attributes:
        shared_sill, local_sill: of the two parts that rows have in common.
        shared_rate, local_rate: powers of two by which they decay per row of distance.
        damping: share of a prediction that is applied.
        scales: float32, scale of a row by its offset in the span; at least as many as the longest span has rows.
    """

    shared_sill: float
    shared_rate: float
    local_sill: float
    local_rate: float
    damping: float
    scales: torch.Tensor

    @property
    def sills_and_rates(self) -> tuple[float, float, float, float]:
        """What :func:`covariance` takes."""
        return self.shared_sill, self.shared_rate, self.local_sill, self.local_rate


@triton.jit
def covariance(offset_i, offset_j, scale_i, scale_j, shared_sill, shared_rate, local_sill, local_rate):
    """Covariance (n, m) of the drift of rows (n,) and (m,) of one span, without nugget."""
    distance = tl.abs(offset_i[:, None] - offset_j[None, :]).to(tl.float32)
    local = local_sill * scale_i[:, None] * scale_j[None, :] * tl.exp2(-distance * local_rate)
    return shared_sill * tl.exp2(-distance * shared_rate) + local


@triton.jit
def inverse(a, SIZE: tl.constexpr):
    """Inverse of a symmetric positive definite matrix (SIZE, SIZE) by Gauss-Jordan elimination, without pivoting."""
    index = tl.arange(0, SIZE)
    for k in range(SIZE):
        is_k = index == k
        row = tl.sum(tl.where(is_k[:, None], a, 0.0), 0)
        column = tl.sum(tl.where(is_k[None, :], a, 0.0), 1)
        reciprocal = 1.0 / tl.sum(tl.where(is_k, row, 0.0), 0)
        a -= column[:, None] * row[None, :] * reciprocal
        a = tl.where(is_k[:, None], row[None, :] * reciprocal, a)
        a = tl.where(is_k[None, :], -column[:, None] * reciprocal, a)
        a = tl.where(is_k[:, None] & is_k[None, :], reciprocal, a)
    return a


@triton.jit
def ordered(x):
    """int32 in the order of float32 that are not negative; negative ones become negative."""
    return x.to(tl.int32, bitcast=True)
