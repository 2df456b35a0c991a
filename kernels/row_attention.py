"""Attention of arbitrary rows over paged KV, rows of several requests in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.attention_spec import AttentionSpec
from a3_sglang.kernels.common import (
    add_sinks,
    has_wide_products,
    load_queries,
    logit_arguments,
    product_dtype,
    query_lanes,
    sink_arguments,
    softmax_step,
    start_softmax,
    tile_width,
    window_arguments,
)


@dataclass(frozen=True, slots=True)
class TileShape:
    """How the work is cut.

    Attributes:
        block_m: query rows times heads per KV head that one program computes.
        block_n: context positions that a program reads per step.
        num_warps: of a program.
        num_stages: of Triton's software pipeline. Its stages are divided between the loads of slots and those of the KV
            that they address, so with five of them two blocks of KV are on their way while one is multiplied; with
            three or four the loop waits for the block that it has just asked for.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


WIDE = TileShape(block_m=128, block_n=64, num_warps=8, num_stages=5)
NARROW = TileShape(block_m=128, block_n=32, num_warps=8, num_stages=5)
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


def default_shape() -> TileShape:
    """The shape that suits the GPU."""
    return WIDE if has_wide_products() else NARROW


def make_tiles(
    counts: Sequence[int],
    slots: Sequence[torch.Tensor],
    kv_lens: Sequence[torch.Tensor],
    group: int,
    shape: TileShape,
) -> Tiles:
    """Cut the rows of several requests into tiles; forces no host-device sync.

    Args:
        counts: rows of each request.
        slots: int64 (context,) of each request.
        kv_lens: int64 (rows,) of each request, ascending.
        group: query heads per KV head, at most ``shape.block_m``.
        shape: of the tiles.
    """
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
    lse,
    table,
    slots,
    kv_lens,
    stride_qm,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_om,
    stride_oh,
    stride_lm,
    stride_lh,
    sinks,
    scaling,
    cap,
    window,
    lse_unit,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    STARTED: tl.constexpr,
):
    """One tile of rows over its request's context, for one KV head. Grid: (tiles, kv_heads).

    ``STARTED``: ``out`` and ``lse`` already are the attention of all rows over what the tile's first row attends to,
    without a window and sinks; only the rest is read, and ``out`` is overwritten.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(table + 3 * tile)
    row_count = tl.load(table + 3 * tile + 1)
    slots += tl.load(table + 3 * tile + 2)

    # Load the queries, and how far each row attends.
    row, head, mask_m = query_lanes(first_row, row_count, kv_head, 0, GROUP, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < DIM
    q = load_queries(query, row, head, mask_m, stride_qm, stride_qh, offs_d, mask_d, DTYPE)
    kv_len = tl.load(kv_lens + row, mask=mask_m, other=1)
    longest = tl.max(kv_len, 0)
    # Lanes without a row attend like the last one, so that their softmax stays finite; they are not stored.
    kv_len = tl.where(mask_m, kv_len, longest)
    shortest = tl.min(kv_len, 0)
    offs_n = tl.arange(0, BLOCK_N)
    offs_out = row[:, None] * stride_om + head[:, None] * stride_oh + offs_d[None, :]
    mask_out = mask_m[:, None] & mask_d[None, :]
    keys += kv_head * stride_kh + offs_d[None, :]
    values += kv_head * stride_vh + offs_d[None, :]
    if STARTED:
        seen = shortest
        m_i = tl.load(lse + row * stride_lm + head * stride_lh, mask=mask_m, other=0.0) * lse_unit
        l_i = tl.full((BLOCK_M,), 1.0, tl.float32)
        acc = tl.load(out + offs_out, mask=mask_out, other=0.0).to(tl.float32)
    else:
        m_i, l_i, acc = start_softmax(BLOCK_M, BLOCK_D)
        seen = shortest // BLOCK_N * BLOCK_N
    if WINDOWED:
        # From the first position that a row attends to, every block needs a mask.
        seen = tl.maximum(shortest - 1 - window, 0)
    elif not STARTED:
        # Blocks that all rows attend to in full need no mask. Rows of a tile are close to each other in the prompt, so
        # that is most of the context.
        for begin in range(0, seen, BLOCK_N):
            slot = tl.load(slots + begin + offs_n)
            k = tl.load(keys + slot[:, None] * stride_kn, mask=mask_d[None, :], other=0.0)
            v = tl.load(values + slot[:, None] * stride_vn, mask=mask_d[None, :], other=0.0)
            m_i, l_i, acc = softmax_step(
                q, k.to(DTYPE), v.to(DTYPE), True, scaling, cap, m_i, l_i, acc, CAPPED, MASKED=False
            )
    # The rest, up to the longest row.
    for begin in range(seen, longest, BLOCK_N):
        position = begin + offs_n
        slot = tl.load(slots + position, mask=position < longest, other=0)
        mask_nd = (position < longest)[:, None] & mask_d[None, :]
        k = tl.load(keys + slot[:, None] * stride_kn, mask=mask_nd, other=0.0)
        v = tl.load(values + slot[:, None] * stride_vn, mask=mask_nd, other=0.0)
        visible = position[None, :] < kv_len[:, None]
        if WINDOWED:
            visible &= position[None, :] >= kv_len[:, None] - 1 - window
        m_i, l_i, acc = softmax_step(
            q, k.to(DTYPE), v.to(DTYPE), visible, scaling, cap, m_i, l_i, acc, CAPPED, MASKED=True
        )

    # Add the sinks, normalize and store.
    if SINKS:
        m_i, l_i, acc = add_sinks(sinks, head, mask_m, m_i, l_i, acc)
    tl.store(out + offs_out, (acc / l_i[:, None]).to(out.dtype.element_ty), mask=mask_out)


@dataclass(frozen=True, slots=True)
class Start:
    """Attention of all rows over as much context as the first row of their tile attends to.

    Attributes:
        out: (rows, heads, head_dim), dtype of the query.
        lse: float32 (rows, heads), logarithm of each row's sum of exponentials; any strides.
        unit: what ``lse`` is multiplied by to get a logarithm to base 2: :data:`~a3_sglang.kernels.common.LOG2E` if it
            is a natural one.
    """

    out: torch.Tensor
    lse: torch.Tensor
    unit: float


def row_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: Tiles,
    spec: AttentionSpec,
    start: Start | None = None,
) -> torch.Tensor:
    """Softmax attention of each row over the first ``kv_lens`` slots of its request; softmax in float32.

    Online softmax over blocks of context; the heads of a GQA group are further rows of a tile.

    Args:
        query: (rows, heads, head_dim), fp16, bf16 or fp32; the last dimension is contiguous, here and below.
        keys: (slots, kv_heads, head_dim), dtype of ``query``.
        values: like ``keys``.
        tiles: see :func:`make_tiles`.
        spec: how the layer attends.
        start: what is left out here because it is computed already, by tiles of the same size; ``start.out`` is
            overwritten. Not for a layer with a window.

    Returns:
        (rows, heads, head_dim), dtype of ``query``.
    """
    rows, heads, dim = query.shape
    kv_heads, shape, width = keys.shape[1], tiles.shape, tile_width(dim)
    if start is None:
        # Without a start, the last two of these are not read.
        out, lse, unit = torch.empty((rows, heads, dim), dtype=query.dtype, device=query.device), query, 1.0
    else:
        out, lse, unit = start.out, start.lse, start.unit
    _row_attention_kernel[(len(tiles.table), kv_heads)](
        query,
        keys,
        values,
        out,
        lse,
        tiles.table,
        tiles.slots,
        tiles.kv_lens,
        *query.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        *out.stride()[:2],
        *lse.stride()[:2],
        lse_unit=unit,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_D=width,
        BLOCK_M=shape.block_m,
        # Heads of more than 128 dimensions leave room for fewer positions.
        BLOCK_N=min(shape.block_n, max(16, shape.block_n * 128 // width)),
        DTYPE=product_dtype(query),
        STARTED=start is not None,
        **logit_arguments(spec),
        **window_arguments(spec),
        **sink_arguments(spec, unread=query),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return out
