"""Weights that predict the drift of every row of a block from its observed ones: kriging, one system per block.

Systems have as many unknowns as the block really has observed rows, which only the device knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import DTYPES
from a3_sglang.kernels.drift_common import PIVOTS, CovarianceTable, covariance, inverse

WIDTH_UNIT = 32
"""Weights of a row are padded to multiples of this, so that they begin at whole 16 bytes."""
COLUMNS = tl.constexpr(5)
"""Of :attr:`Blocks.table`."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of reused rows of several requests, and the rows of a pass that are observed in them.

    Positions count through all requests: those of a request begin where those of the one before end.

    Attributes:
        table: int32 (blocks, 5): position of a block's first row, number of rows, offset of its first row in the span,
            number of its first row among all reused rows, and ordinal of its request.
        observed_pos: int64 (n,), ascending: positions of the rows of the pass, gaps included.
        bounds: int64 (2, blocks): the rows of the pass that are in each block, from the first to before the second.
        wanted: int64 (requests, 2): positions from the first to before the second are predicted.
        size: rows of the longest block.
        width: upper bound of the observed rows per block, a multiple of :data:`WIDTH_UNIT`.
    """

    table: torch.Tensor
    observed_pos: torch.Tensor
    bounds: torch.Tensor
    wanted: torch.Tensor
    size: int
    width: int


@triton.jit
def observed_range(bounds, block, blocks, width):
    """First observed row of a block, among the rows of the pass, and number of them."""
    first = tl.load(bounds + block)
    return first, tl.minimum((tl.load(bounds + blocks + block) - first).to(tl.int32), width)


@triton.jit
def _invert_kernel(
    table,
    observed_pos,
    bounds,
    scales,
    matrices,
    width,
    shared_sill,
    shared_rate,
    local_sill,
    local_rate,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """Inverse covariance, nugget included, of a block's observed rows, padded with ones. Grid: (blocks,).

    Gauss-Jordan elimination in place, a few pivots at a time; the nugget keeps them well above zero.
    """
    block = tl.program_id(0)
    entry = table + COLUMNS * block
    # Offset in the span of the row at position 0, which may be negative.
    origin = tl.load(entry + 2) - tl.load(entry)
    first, count = observed_range(bounds, block, tl.num_programs(0), width)
    matrices += block.to(tl.int64) * width * width
    nugget_sill = 1.0 - shared_sill - local_sill
    padded = (count + PIVOTS - 1) // PIVOTS * PIVOTS
    for begin_i in range(0, padded, BLOCK_M):
        i = begin_i + tl.arange(0, BLOCK_M)
        offset_i = (tl.load(observed_pos + first + i, mask=i < count, other=0) + origin).to(tl.int32)
        scale_i = tl.load(scales + offset_i, mask=i < count, other=0.0)
        for begin_j in range(0, padded, BLOCK_N):
            j = begin_j + tl.arange(0, BLOCK_N)
            offset_j = (tl.load(observed_pos + first + j, mask=j < count, other=0) + origin).to(tl.int32)
            scale_j = tl.load(scales + offset_j, mask=j < count, other=0.0)
            a = covariance(offset_i, offset_j, scale_i, scale_j, shared_sill, shared_rate, local_sill, local_rate)
            a = tl.where((i < count)[:, None] & (j < count)[None, :], a, 0.0)
            diagonal = tl.where(i < count, nugget_sill * scale_i * scale_i, 1.0)
            a += tl.where(i[:, None] == j[None, :], diagonal[:, None], 0.0)
            mask = (i < padded)[:, None] & (j < padded)[None, :]
            tl.store(matrices + i[:, None] * width + j[None, :], a, mask=mask)
    # Other threads read what these have written, here and below.
    tl.debug_barrier()
    for begin in range(0, padded, PIVOTS):
        p = begin + tl.arange(0, PIVOTS)
        pivot = inverse(tl.load(matrices + p[:, None] * width + p[None, :]), PIVOTS)
        for begin_i in range(0, padded, BLOCK_M):
            i = begin_i + tl.arange(0, BLOCK_M)
            other_i = (i < padded) & ((i < begin) | (i >= begin + PIVOTS))
            side = tl.load(matrices + i[:, None] * width + p[None, :], mask=other_i[:, None], other=0.0)
            side = tl.dot(side, pivot, input_precision="ieee")
            for begin_j in range(0, padded, BLOCK_N):
                j = begin_j + tl.arange(0, BLOCK_N)
                other_j = (j < padded) & ((j < begin) | (j >= begin + PIVOTS))
                top = tl.load(matrices + p[:, None] * width + j[None, :], mask=other_j[None, :], other=0.0)
                at = matrices + i[:, None] * width + j[None, :]
                mask = other_i[:, None] & other_j[None, :]
                a = tl.load(at, mask=mask, other=0.0) - tl.dot(side, top, input_precision="ieee")
                tl.store(at, a, mask=mask)
        tl.debug_barrier()
        for begin_j in range(0, padded, BLOCK_N):
            j = begin_j + tl.arange(0, BLOCK_N)
            other_j = (j < padded) & ((j < begin) | (j >= begin + PIVOTS))
            at = matrices + p[:, None] * width + j[None, :]
            top = tl.dot(pivot, tl.load(at, mask=other_j[None, :], other=0.0), input_precision="ieee")
            tl.debug_barrier()
            tl.store(at, top, mask=other_j[None, :])
        for begin_i in range(0, padded, BLOCK_M):
            i = begin_i + tl.arange(0, BLOCK_M)
            other_i = (i < padded) & ((i < begin) | (i >= begin + PIVOTS))
            at = matrices + i[:, None] * width + p[None, :]
            side = tl.dot(tl.load(at, mask=other_i[:, None], other=0.0), pivot, input_precision="ieee")
            tl.debug_barrier()
            tl.store(at, -side, mask=other_i[:, None])
        tl.store(matrices + p[:, None] * width + p[None, :], pivot)
        tl.debug_barrier()


@triton.jit
def _weights_kernel(
    table,
    observed_pos,
    bounds,
    wanted,
    scales,
    matrices,
    weights,
    size,
    width,
    shared_sill,
    shared_rate,
    local_sill,
    local_rate,
    damping,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """Weights of a tile of a block's rows: covariance with the observed rows times the inverse. Grid: (tiles, blocks).

    Columns without an observed row get zero up to a multiple of ``BLOCK_N``; those after it are not written.
    """
    block = tl.program_id(1)
    entry = table + COLUMNS * block
    first_pos, rows, offset = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    request = tl.load(entry + 4)
    first, count = observed_range(bounds, block, tl.num_programs(1), width)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale_i = tl.load(scales + offset + i, mask=i < rows, other=0.0)
    position = first_pos + i.to(tl.int64)
    is_wanted = (position >= tl.load(wanted + 2 * request)) & (position < tl.load(wanted + 2 * request + 1))
    is_wanted = is_wanted & (i < rows)
    padded = (count + PIVOTS - 1) // PIVOTS * PIVOTS
    for begin_j in range(0, count, BLOCK_N):
        j = begin_j + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin_k in range(0, count, BLOCK_K):
            k = begin_k + tl.arange(0, BLOCK_K)
            offset_k = (tl.load(observed_pos + first + k, mask=k < count, other=0) - first_pos).to(tl.int32) + offset
            scale_k = tl.load(scales + offset_k, mask=k < count, other=0.0)
            cross = covariance(offset + i, offset_k, scale_i, scale_k, shared_sill, shared_rate, local_sill, local_rate)
            cross = tl.where(is_wanted[:, None] & (k < count)[None, :], cross, 0.0)
            inverses = tl.load(
                matrices + block.to(tl.int64) * width * width + k[:, None] * width + j[None, :],
                mask=(k < padded)[:, None] & (j < padded)[None, :],
                other=0.0,
            )
            acc += tl.dot(cross, inverses, input_precision="ieee")
        at = weights + (block * size + i).to(tl.int64)[:, None] * width + j[None, :]
        tl.store(at, (acc * damping).to(DTYPE), mask=(i < size)[:, None] & (j < width)[None, :])


def kriging_weights(blocks: Blocks, kind: CovarianceTable, dtype: torch.dtype) -> torch.Tensor:
    """How much of the drift of each of its block's observed rows goes into the prediction of each row.

    Returns:
        ``dtype`` (blocks, size, width), contiguous. Rows that are not wanted have zeros. Columns after a block's last
        observed row are zero up to a multiple of :data:`WIDTH_UNIT`, and arbitrary from there on.
    """
    device, count = blocks.table.device, len(blocks.table)
    matrices = torch.empty((count, blocks.width, blocks.width), device=device)
    weights = torch.empty((count, blocks.size, blocks.width), dtype=dtype, device=device)
    _invert_kernel[(count,)](
        blocks.table,
        blocks.observed_pos,
        blocks.bounds,
        kind.scales,
        matrices,
        blocks.width,
        *kind.sills_and_rates,
        BLOCK_M=32,
        BLOCK_N=64,
        PIVOTS=PIVOTS,
        num_warps=8,
        num_stages=1,
    )
    _weights_kernel[(triton.cdiv(blocks.size, 64), count)](
        blocks.table,
        blocks.observed_pos,
        blocks.bounds,
        blocks.wanted,
        kind.scales,
        matrices,
        weights,
        blocks.size,
        blocks.width,
        *kind.sills_and_rates,
        kind.damping,
        DTYPE=DTYPES[dtype],
        BLOCK_M=64,
        BLOCK_N=WIDTH_UNIT,
        BLOCK_K=32,
        PIVOTS=PIVOTS,
        num_warps=4,
    )
    return weights
