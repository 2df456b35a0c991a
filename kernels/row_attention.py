"""Attention of arbitrary rows over paged KV, rows of several requests in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import (
    LOG2E,
    has_wide_products,
    load_queries,
    product_dtype,
    query_lanes,
    softmax_step,
    tile_width,
)


@dataclass(frozen=True, slots=True)
class TileShape:
    """How the work is cut.

    Attributes:
        block_m: query rows times heads per KV head that one program computes.
        block_n: context positions that a program reads per step.
        num_warps, num_stages: of a program; stages of Triton's software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


WIDE = TileShape(block_m=128, block_n=64, num_warps=8, num_stages=3)
NARROW = TileShape(block_m=128, block_n=32, num_warps=8, num_stages=3)
"""See :func:`a3_sglang.kernels.common.has_wide_products`."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which program computes which rows; made on the host once for all layers.

    Attributes:
        shape: of the tiles.
        table: int32 (tiles, 3): first row and number of rows of a tile, and where its request begins in ``slots``. The
            last rows of each request come first, as they attend to most.
        slots: int64 (sum of contexts,), the requests' slots, concatenated.
        kv_lens: int64 (rows,): how many of its request's slots each row attends to; at least 1, and all of them hold
            KV.
    """

    shape: TileShape
    table: torch.Tensor
    slots: torch.Tensor
    kv_lens: torch.Tensor


def make_tiles(
    counts: Sequence[int],
    slots: Sequence[torch.Tensor],
    kv_lens: Sequence[torch.Tensor],
    group: int,
    shape: TileShape | None = None,
) -> Tiles:
    """Cut the rows of several requests into tiles; forces no host-device sync.

    Args:
        counts: rows of each request.
        slots: int64 (context,) of each request.
        kv_lens: int64 (rows,) of each request, ascending.
        group: query heads per KV head, at most ``shape.block_m``.
        shape: of the tiles; by default the one that suits the GPU.
    """
    if shape is None:
        shape = WIDE if has_wide_products() else NARROW
    step = shape.block_m // group
    table, row, begin = [], 0, 0
    for count, context in zip(counts, slots, strict=True):
        table += [(row + i, min(step, count - i), begin) for i in reversed(range(0, count, step))]
        row, begin = row + count, begin + len(context)
    return Tiles(
        shape,
        torch.tensor(table, dtype=torch.int32).to(slots[0].device, non_blocking=True),
        torch.cat(list(slots)),
        torch.cat(list(kv_lens)),
    )


@triton.jit
def _row_attention_kernel(
    query,
    keys,
    values,
    out,
    table,
    slots,
    kv_lens,
    scaling,
    stride_qm,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_om,
    stride_oh,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One tile of rows over its request's context, for one KV head. Grid: (tiles, kv_heads)."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(table + 3 * tile)
    row_count = tl.load(table + 3 * tile + 1)
    slots += tl.load(table + 3 * tile + 2)

    # Load the queries, and how far each row attends.
    row, head, mask_m = query_lanes(first_row, row_count, kv_head, GROUP, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < DIM
    q = load_queries(query, row, head, mask_m, stride_qm, stride_qh, offs_d, mask_d, DTYPE)
    # Lanes without a row attend to one position, so that their softmax stays finite; they are not stored.
    kv_len = tl.load(kv_lens + row, mask=mask_m, other=1)
    longest = tl.max(kv_len, 0)
    # Blocks that all rows attend to in full need no mask. Rows of a tile are close to each other in the prompt, so that
    # is most of the context.
    unmasked = tl.min(tl.where(mask_m, kv_len, longest), 0) // BLOCK_N * BLOCK_N

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    keys += kv_head * stride_kh + offs_d[None, :]
    values += kv_head * stride_vh + offs_d[None, :]
    offs_n = tl.arange(0, BLOCK_N)
    # Context that all rows attend to.
    for begin in range(0, unmasked, BLOCK_N):
        slot = tl.load(slots + begin + offs_n)
        k = tl.load(keys + slot[:, None] * stride_kn, mask=mask_d[None, :], other=0.0)
        v = tl.load(values + slot[:, None] * stride_vn, mask=mask_d[None, :], other=0.0)
        m_i, l_i, acc = softmax_step(q, k.to(DTYPE), v.to(DTYPE), True, scaling, m_i, l_i, acc, MASKED=False)
    # The rest, up to the longest row.
    for begin in range(unmasked, longest, BLOCK_N):
        position = begin + offs_n
        slot = tl.load(slots + position, mask=position < longest, other=0)
        mask_nd = (position < longest)[:, None] & mask_d[None, :]
        k = tl.load(keys + slot[:, None] * stride_kn, mask=mask_nd, other=0.0)
        v = tl.load(values + slot[:, None] * stride_vn, mask=mask_nd, other=0.0)
        visible = position[None, :] < kv_len[:, None]
        m_i, l_i, acc = softmax_step(q, k.to(DTYPE), v.to(DTYPE), visible, scaling, m_i, l_i, acc, MASKED=True)

    # Normalize and store.
    tl.store(
        out + row[:, None] * stride_om + head[:, None] * stride_oh + offs_d[None, :],
        (acc / l_i[:, None]).to(out.dtype.element_ty),
        mask=mask_m[:, None] & mask_d[None, :],
    )


def row_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: Tiles, scaling: float
) -> torch.Tensor:
    """Softmax attention of each row over the first ``kv_lens`` slots of its request; softmax in float32.

    Online softmax over blocks of context; the heads of a GQA group are further rows of a tile.

    Args:
        query: (rows, heads, head_dim), fp16, bf16 or fp32; the last dimension is contiguous, here and below.
        keys: (slots, kv_heads, head_dim), dtype of ``query``.
        values: like ``keys``.
        tiles: see :func:`make_tiles`.
        scaling: factor of the logits.

    Returns:
        (rows, heads, head_dim), dtype of ``query``.
    """
    rows, heads, dim = query.shape
    kv_heads, shape = keys.shape[1], tiles.shape
    out = torch.empty((rows, heads, dim), dtype=query.dtype, device=query.device)
    _row_attention_kernel[(len(tiles.table), kv_heads)](
        query,
        keys,
        values,
        out,
        tiles.table,
        tiles.slots,
        tiles.kv_lens,
        scaling * LOG2E,
        *query.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        *out.stride()[:2],
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_D=tile_width(dim),
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        DTYPE=product_dtype(query),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out
