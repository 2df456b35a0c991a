"""A question's attention over paged KV, and what it takes from each position; several requests in one launch.

Two passes over the keys. The first attends: every program takes a piece of one request's context and leaves its share
of the output and of the softmax's sum; a small kernel joins the shares (split softmax, FlashDecoding). The second
knows each row's sum and turns keys into relevance, without the attention matrix ever being written. No atomic
additions: the result does not depend on the order of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import LOG2E, fold, lanes, padded, product_dtype

LANES = 64
"""Rows that one program takes, of all heads of a group together while it attends, of one head while it ranks."""
PIECE = 512
"""Context positions that one program attends to."""
BLOCK = 64
"""Context positions that a program reads at a time."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which program takes what; made on the host once for all layers.

    Attributes:
        pieces: int32 (pieces, 5): first row, number of rows, first position in ``slots``, number of positions, and
            whether they are the rows' own (then the second entry from the end counts the request's rows).
        tiles: int32 (tiles, 4): first row, number of rows, the tile's first piece, how many pieces it has.
        blocks: int32 (blocks, 4): first position in ``slots``, number of positions, the request's first row and
            number of rows.
        slots: int64 (sum of contexts,): the requests' known slots behind each other.
        rows: of all requests.
    """

    pieces: torch.Tensor
    tiles: torch.Tensor
    blocks: torch.Tensor
    slots: torch.Tensor
    rows: int


def make_layout(counts: Sequence[int], slots: Sequence[torch.Tensor], group: int) -> Layout:
    """Cut the questions of several requests and their contexts; reads nothing back from the device.

    Args:
        counts: question rows of each request, at most :data:`LANES`, the last rows of its prompt.
        slots: int64 (context,) of each request: the slots that all its rows see.
        group: query heads for each KV head, at most :data:`LANES`.
    """
    step = LANES // group
    pieces: list[tuple[int, ...]] = []
    tiles: list[tuple[int, ...]] = []
    blocks: list[tuple[int, ...]] = []
    row = begin = 0
    for count, own in zip(counts, slots, strict=True):
        for at in range(0, count, step):
            rows, first = (row + at, min(step, count - at)), len(pieces)
            pieces += [(*rows, begin + c, min(PIECE, len(own) - c), 0) for c in range(0, len(own), PIECE)]
            pieces.append((*rows, row, count, 1))
            tiles.append((*rows, first, len(pieces) - first))
        blocks += [(begin + c, min(BLOCK, len(own) - c), row, count) for c in range(0, len(own), BLOCK)]
        row, begin = row + count, begin + len(own)

    def table(entries: list[tuple[int, ...]], width: int) -> torch.Tensor:
        return torch.tensor(entries, dtype=torch.int32).view(-1, width).to(slots[0].device, non_blocking=True)

    return Layout(table(pieces, 5), table(tiles, 4), table(blocks, 4), torch.cat(list(slots)), row)


@triton.jit
def _attend(
    query,
    own_keys,
    own_values,
    keys,
    values,
    pieces,
    slots,
    mixed_out,
    top_out,
    total_out,
    sizes,
    scaling,
    contexts,
    query_row,
    query_head,
    own_key_row,
    own_key_head,
    own_value_row,
    own_value_head,
    key_slot,
    key_head,
    value_slot,
    value_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CONTEXT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    piece, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(pieces + 5 * piece)
    count = tl.load(pieces + 5 * piece + 1)
    begin = tl.load(pieces + 5 * piece + 2)
    length = tl.load(pieces + 5 * piece + 3)
    own = tl.load(pieces + 5 * piece + 4) == 1

    row, head, live = lanes(first, count, kv_head, GROUP, ROWS)
    dim = tl.arange(0, WIDTH)
    inside = dim < DIM
    q = tl.load(
        query + row[:, None] * query_row + head[:, None] * query_head + dim[None, :],
        mask=live[:, None] & inside[None, :],
        other=0.0,
    ).to(DTYPE)
    # Of its own rows a row sees those up to itself, of the context all. Lanes without a row see the first position.
    last = tl.where(own, tl.where(live, row - begin, 0), length - 1)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for at in range(0, length, CONTEXT):
        place = at + tl.arange(0, CONTEXT)
        here = place < length
        known = here[:, None] & inside[None, :]
        if own:
            index = (begin + place).to(tl.int64)
            k_at = own_keys + index[:, None] * own_key_row + kv_head * own_key_head
            v_at = own_values + index[:, None] * own_value_row + kv_head * own_value_head
            k = tl.load(k_at + dim[None, :], mask=known, other=0.0).to(DTYPE)
            v = tl.load(v_at + dim[None, :], mask=known, other=0.0).to(DTYPE)
        else:
            slot = tl.load(slots + begin + place, mask=here, other=0)
            k_at = keys + slot[:, None] * key_slot + kv_head * key_head
            v_at = values + slot[:, None] * value_slot + kv_head * value_head
            k = tl.load(k_at + dim[None, :], mask=known, other=0.0).to(DTYPE)
            v = tl.load(v_at + dim[None, :], mask=known, other=0.0).to(DTYPE)
            # Every tile of a request writes the same here.
            size = tl.sqrt(tl.sum(v.to(tl.float32) * v.to(tl.float32), 1))
            tl.store(sizes + kv_head.to(tl.int64) * contexts + begin + place, size, mask=here)
        top, total, mixed = fold(q, k, v, place[None, :] <= last[:, None], scaling, top, total, mixed)

    at = (piece.to(tl.int64) * tl.num_programs(1) + kv_head) * ROWS + tl.arange(0, ROWS)
    tl.store(mixed_out + at[:, None] * WIDTH + dim[None, :], mixed)
    tl.store(top_out + at, top)
    tl.store(total_out + at, total)


@triton.jit
def _join(
    mixed_in,
    top_in,
    total_in,
    tiles,
    out,
    sums,
    rows,
    out_row,
    out_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles + 4 * tile)
    count = tl.load(tiles + 4 * tile + 1)
    piece = tl.load(tiles + 4 * tile + 2)
    number = tl.load(tiles + 4 * tile + 3)
    lane = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(0, number):
        at = ((piece + i).to(tl.int64) * tl.num_programs(1) + kv_head) * ROWS + lane
        here = tl.load(top_in + at)
        higher = tl.maximum(top, here)
        shrink, share = tl.exp2(top - higher), tl.exp2(here - higher)
        total = total * shrink + tl.load(total_in + at) * share
        mixed = mixed * shrink[:, None] + tl.load(mixed_in + at[:, None] * WIDTH + dim[None, :]) * share[:, None]
        top = higher
    row, head, live = lanes(first, count, kv_head, GROUP, ROWS)
    tl.store(
        out + row[:, None] * out_row + head[:, None] * out_head + dim[None, :],
        (mixed / total[:, None]).to(out.dtype.element_ty),
        mask=live[:, None] & (dim < DIM)[None, :],
    )
    tl.store(sums + head.to(tl.int64) * rows + row, top + tl.log2(total), mask=live)


@triton.jit
def _rank(
    query,
    keys,
    blocks,
    slots,
    sums,
    sizes,
    scores,
    scaling,
    contexts,
    rows,
    query_row,
    query_head,
    key_slot,
    key_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CONTEXT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    block = tl.program_id(0)
    begin = tl.load(blocks + 4 * block)
    length = tl.load(blocks + 4 * block + 1)
    first = tl.load(blocks + 4 * block + 2)
    count = tl.load(blocks + 4 * block + 3)
    place, lane, dim = tl.arange(0, CONTEXT), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    here, live, inside = place < length, lane < count, dim < DIM
    slot = tl.load(slots + begin + place, mask=here, other=0)
    row = (first + lane).to(tl.int64)
    score = tl.zeros((CONTEXT,), tl.float32)
    for kv_head in range(KV_HEADS):
        k = tl.load(
            keys + slot[:, None] * key_slot + kv_head * key_head + dim[None, :],
            mask=here[:, None] & inside[None, :],
            other=0.0,
        ).to(DTYPE)
        taken = tl.zeros((CONTEXT,), tl.float32)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q = tl.load(
                query + row[:, None] * query_row + head * query_head + dim[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            ).to(DTYPE)
            of_row = tl.load(sums + head * rows + row, mask=live, other=float("inf"))
            weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scaling - of_row[:, None])
            taken += tl.sqrt(tl.sum(weights * weights, 0) / count)
        score += taken * tl.load(sizes + kv_head * contexts + begin + place, mask=here, other=0.0)
    before = tl.load(scores + begin + place, mask=here, other=0.0)
    tl.store(scores + begin + place, before + score, mask=here)


def question_attention(
    query: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    scaling: float,
    scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of questions over their contexts and, causally, themselves; softmax in float32.

    Args:
        query: (rows, heads, head_dim), fp16, bf16 or fp32; the last dimension is contiguous, here and below.
        own: keys and values of the rows, each (rows, kv_heads, head_dim), which have no slots.
        keys: (slots, kv_heads, head_dim), the dtype of ``query`` or fp8.
        values: like ``keys``.
        layout: see :func:`make_layout`.
        scaling: factor of the logits.
        scores: float32 (sum of contexts,), to which is added what each position gives to its question: over heads,
            the root mean square of the rows' attention to it times the norm of its value
            (:func:`a3_sglang.kernels.relevance.relevance`).

    Returns:
        (rows, heads, head_dim), dtype of ``query``.
    """
    heads, dim = query.shape[1:]
    kv_heads, contexts = keys.shape[1], len(layout.slots)
    width = padded(dim)
    lanes, device = (len(layout.pieces), kv_heads, LANES), query.device
    out = torch.empty(query.shape, dtype=query.dtype, device=device)
    mixed = torch.empty((*lanes, width), device=device)
    top, total = torch.empty(lanes, device=device), torch.empty(lanes, device=device)
    sizes = torch.empty((kv_heads, contexts), device=device)
    sums = torch.empty((heads, layout.rows), device=device)
    own_keys, own_values = own
    dtype = product_dtype(query)
    shape = {"GROUP": heads // kv_heads, "DIM": dim, "WIDTH": width, "ROWS": LANES}
    _attend[(len(layout.pieces), kv_heads)](
        query,
        own_keys,
        own_values,
        keys,
        values,
        layout.pieces,
        layout.slots,
        mixed,
        top,
        total,
        sizes,
        scaling * LOG2E,
        contexts,
        *query.stride()[:2],
        *own_keys.stride()[:2],
        *own_values.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        CONTEXT=BLOCK,
        DTYPE=dtype,
        num_warps=4,
        num_stages=3,
        **shape,
    )
    _join[(len(layout.tiles), kv_heads)](
        mixed, top, total, layout.tiles, out, sums, layout.rows, *out.stride()[:2], num_warps=4, **shape
    )
    if scores is not None and len(layout.blocks):
        _rank[(len(layout.blocks),)](
            query,
            keys,
            layout.blocks,
            layout.slots,
            sums,
            sizes,
            scores,
            scaling * LOG2E,
            contexts,
            layout.rows,
            *query.stride()[:2],
            *keys.stride()[:2],
            KV_HEADS=kv_heads,
            CONTEXT=BLOCK,
            DTYPE=dtype,
            num_warps=4,
            num_stages=2,
            **shape,
        )
    return out
