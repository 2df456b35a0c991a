"""Attention of arbitrary rows over paged KV, rows of several requests in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import LOG2E, fold, has_wide_products, lanes, padded, product_dtype, queries


@dataclass(frozen=True, slots=True)
class Shape:
    """How the work is cut.

    Attributes:
        rows: query rows times heads of a group that one program takes.
        context: positions that a program reads at a time.
        warps, stages: of a program; stages are the blocks of context on their way at a time.
    """

    rows: int
    context: int
    warps: int
    stages: int


WIDE = Shape(rows=128, context=64, warps=8, stages=3)
NARROW = Shape(rows=128, context=32, warps=8, stages=3)
"""See :func:`a3_sglang.kernels.common.has_wide_products`."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which program takes which rows; made on the host once for all layers.

    Attributes:
        shape: the tiles are made for.
        table: int32 (tiles, 3): a tile's first row, the number of its rows, where its request begins in ``slots``.
            Of each request the last rows come first, which have most to see.
        slots: int64 (sum of contexts,), the requests' slots behind each other.
        visible: int64 (rows,): how many of its request's slots each row sees; at least 1, and none unwritten.
    """

    shape: Shape
    table: torch.Tensor
    slots: torch.Tensor
    visible: torch.Tensor


def make_tiles(
    counts: Sequence[int],
    slots: Sequence[torch.Tensor],
    visible: Sequence[torch.Tensor],
    group: int,
    shape: Shape | None = None,
) -> Tiles:
    """Cut the rows of several requests into tiles; reads nothing back from the device.

    Args:
        counts: rows of each request.
        slots: int64 (context,) of each request.
        visible: int64 (rows,) of each request, ascending.
        group: query heads for each KV head, at most ``shape.rows``.
        shape: how the work is cut; by default as it suits the GPU.
    """
    if shape is None:
        shape = WIDE if has_wide_products() else NARROW
    step = shape.rows // group
    table, row, begin = [], 0, 0
    for count, own in zip(counts, slots, strict=True):
        table += [(row + at, min(step, count - at), begin) for at in reversed(range(0, count, step))]
        row, begin = row + count, begin + len(own)
    return Tiles(
        shape,
        torch.tensor(table, dtype=torch.int32).to(slots[0].device, non_blocking=True),
        torch.cat(list(slots)),
        torch.cat(list(visible)),
    )


@triton.jit
def _row_attention(
    query,
    keys,
    values,
    out,
    table,
    slots,
    visible,
    scaling,
    query_row,
    query_head,
    key_slot,
    key_head,
    value_slot,
    value_head,
    out_row,
    out_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CONTEXT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(table + 3 * tile)
    count = tl.load(table + 3 * tile + 1)
    slots += tl.load(table + 3 * tile + 2)

    row, head, live = lanes(first, count, kv_head, GROUP, ROWS)
    dim = tl.arange(0, WIDTH)
    inside = dim < DIM
    q = queries(query, row, head, live, query_row, query_head, dim, inside, DTYPE)
    # Lanes without a row see one position, so that their softmax stays finite; they are not stored.
    seen = tl.load(visible + row, mask=live, other=1)
    reach = tl.max(seen, 0)
    # What all rows see needs no mask. Rows of a tile are neighbours, so that is most of the context.
    common = tl.min(tl.where(live, seen, reach), 0) // CONTEXT * CONTEXT

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    keys += kv_head * key_head + dim[None, :]
    values += kv_head * value_head + dim[None, :]
    place = tl.arange(0, CONTEXT)
    for begin in range(0, common, CONTEXT):
        slot = tl.load(slots + begin + place)
        k = tl.load(keys + slot[:, None] * key_slot, mask=inside[None, :], other=0.0)
        v = tl.load(values + slot[:, None] * value_slot, mask=inside[None, :], other=0.0)
        top, total, mixed = fold(q, k.to(DTYPE), v.to(DTYPE), True, scaling, top, total, mixed, MASKED=False)
    for begin in range(common, reach, CONTEXT):
        at = begin + place
        slot = tl.load(slots + at, mask=at < reach, other=0)
        here = (at < reach)[:, None] & inside[None, :]
        k = tl.load(keys + slot[:, None] * key_slot, mask=here, other=0.0)
        v = tl.load(values + slot[:, None] * value_slot, mask=here, other=0.0)
        seen_here = at[None, :] < seen[:, None]
        top, total, mixed = fold(q, k.to(DTYPE), v.to(DTYPE), seen_here, scaling, top, total, mixed, MASKED=True)

    tl.store(
        out + row[:, None] * out_row + head[:, None] * out_head + dim[None, :],
        (mixed / total[:, None]).to(out.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )


def row_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: Tiles, scaling: float
) -> torch.Tensor:
    """Softmax attention of each row over the first ``visible`` slots of its request; softmax in float32.

    Online softmax over blocks of context, the heads of a group side by side as rows of one block.

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
    _row_attention[(len(tiles.table), kv_heads)](
        query,
        keys,
        values,
        out,
        tiles.table,
        tiles.slots,
        tiles.visible,
        scaling * LOG2E,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        out.stride(0),
        out.stride(1),
        GROUP=heads // kv_heads,
        DIM=dim,
        WIDTH=padded(dim),
        ROWS=shape.rows,
        CONTEXT=shape.context,
        DTYPE=product_dtype(query),
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return out
