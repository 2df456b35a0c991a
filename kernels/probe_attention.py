"""A question's attention over paged KV, and what it takes from each position; several requests in one launch.

Two passes over the keys. The first attends: every program takes a piece of one request's context and leaves its share
of the output and of the softmax's sum; a small kernel adds the question's own rows and joins the shares (split
softmax, FlashDecoding). The second knows each row's sum and turns keys into relevance, without the attention matrix
ever being written. No atomic additions: the result does not depend on the order of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import LOG2E, fold, has_wide_products, lanes, padded, product_dtype, queries

ROWS = 64
"""Rows of a question, at most."""
LANES = 128
"""Rows times heads of a group that one program takes while it attends."""
BLOCK = 64
"""Context positions that a program reads at a time."""
PROGRAMS = 256
"""How many programs the attention of one layer is cut into where there is enough context: about two for each
multiprocessor of a large GPU. More would leave more shares to join."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which program takes what; made on the host once for all layers.

    Attributes:
        pieces: int32 (pieces, 4): first row, number of rows, first position in ``slots``, number of positions. Pieces
            of the same positions are neighbours, so that these are read from memory once.
        tiles: int32 (tiles, 6): first row, number of rows, the request's first row, then first, number and distance of
            the tile's pieces.
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


def make_layout(counts: Sequence[int], slots: Sequence[torch.Tensor], heads: int, kv_heads: int) -> Layout:
    """Cut the questions of several requests and their contexts; reads nothing back from the device.

    Args:
        counts: question rows of each request, at most :data:`ROWS`, the last rows of its prompt.
        slots: int64 (context,) of each request: the slots that all its rows see.
        heads: query heads, at most :data:`LANES` for each KV head.
        kv_heads: KV heads.
    """
    step = LANES // (heads // kv_heads)
    work = sum(-(-count // step) * len(own) for count, own in zip(counts, slots, strict=True)) * kv_heads
    size = max(4 * BLOCK, work // PROGRAMS // BLOCK * BLOCK)
    pieces: list[tuple[int, ...]] = []
    tiles: list[tuple[int, ...]] = []
    blocks: list[tuple[int, ...]] = []
    row = begin = 0
    for count, own in zip(counts, slots, strict=True):
        parts, cuts = range(0, count, step), range(0, len(own), size)
        tiles += [
            (row + at, min(step, count - at), row, len(pieces) + i, len(cuts), len(parts)) for i, at in enumerate(parts)
        ]
        pieces += [(row + at, min(step, count - at), begin + c, min(size, len(own) - c)) for c in cuts for at in parts]
        blocks += [(begin + c, min(BLOCK, len(own) - c), row, count) for c in range(0, len(own), BLOCK)]
        row, begin = row + count, begin + len(own)

    def table(entries: list[tuple[int, ...]], width: int) -> torch.Tensor:
        return torch.tensor(entries, dtype=torch.int32).view(-1, width).to(slots[0].device, non_blocking=True)

    return Layout(table(pieces, 4), table(tiles, 6), table(blocks, 4), torch.cat(list(slots)), row)


@triton.jit(do_not_specialize=["contexts"])
def _attend(
    query,
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
    key_slot,
    key_head,
    value_slot,
    value_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    CONTEXT: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZED: tl.constexpr,
):
    """A tile of a question over a piece of its context: its share of output and sum, and the sizes of the values."""
    piece, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(pieces + 4 * piece)
    count = tl.load(pieces + 4 * piece + 1)
    begin = tl.load(pieces + 4 * piece + 2)
    length = tl.load(pieces + 4 * piece + 3)

    row, head, live = lanes(first, count, kv_head, GROUP, LANES)
    dim = tl.arange(0, WIDTH)
    inside = dim < DIM
    q = queries(query, row, head, live, query_row, query_head, dim, inside, DTYPE)

    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    mixed = tl.zeros((LANES, WIDTH), tl.float32)
    keys += kv_head * key_head + dim[None, :]
    values += kv_head * value_head + dim[None, :]
    for at in range(0, length, CONTEXT):
        place = at + tl.arange(0, CONTEXT)
        here = place < length
        known = here[:, None] & inside[None, :]
        slot = tl.load(slots + begin + place, mask=here, other=0)
        k = tl.load(keys + slot[:, None] * key_slot, mask=known, other=0.0).to(DTYPE)
        v = tl.load(values + slot[:, None] * value_slot, mask=known, other=0.0).to(DTYPE)
        if SIZED:  # Every tile of a request writes the same here.
            size = tl.sqrt(tl.sum(v.to(tl.float32) * v.to(tl.float32), 1))
            tl.store(sizes + kv_head.to(tl.int64) * contexts + begin + place, size, mask=here)
        top, total, mixed = fold(q, k, v, here[None, :], scaling, top, total, mixed, MASKED=True)

    at = (piece.to(tl.int64) * tl.num_programs(1) + kv_head) * LANES + tl.arange(0, LANES)
    tl.store(mixed_out + at[:, None] * WIDTH + dim[None, :], mixed)
    tl.store(top_out + at, top)
    tl.store(total_out + at, total)


@triton.jit(do_not_specialize=["rows"])
def _join(
    query,
    own_keys,
    own_values,
    mixed_in,
    top_in,
    total_in,
    tiles,
    out,
    sums,
    scaling,
    rows,
    query_row,
    query_head,
    own_key_row,
    own_key_head,
    own_value_row,
    own_value_head,
    out_row,
    out_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    OWN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile of a question over its request's own rows up to each, joined with the shares of its pieces."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles + 6 * tile)
    count = tl.load(tiles + 6 * tile + 1)
    begin = tl.load(tiles + 6 * tile + 2)
    piece = tl.load(tiles + 6 * tile + 3)
    number = tl.load(tiles + 6 * tile + 4)
    stride = tl.load(tiles + 6 * tile + 5)

    row, head, live = lanes(first, count, kv_head, GROUP, LANES)
    lane, dim, place = tl.arange(0, LANES), tl.arange(0, WIDTH), tl.arange(0, OWN)
    inside = dim < DIM
    q = queries(query, row, head, live, query_row, query_head, dim, inside, DTYPE)
    # Rows behind the tile's last are seen by none of its rows.
    index = (begin + place).to(tl.int64)[:, None]
    known = (begin + place < first + count)[:, None] & inside[None, :]
    k = tl.load(own_keys + index * own_key_row + kv_head * own_key_head + dim[None, :], mask=known, other=0.0)
    v = tl.load(own_values + index * own_value_row + kv_head * own_value_head + dim[None, :], mask=known, other=0.0)
    # Lanes without a row see the first one, so that their softmax stays finite.
    seen = place[None, :] <= tl.where(live, row - begin, 0)[:, None]
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    mixed = tl.zeros((LANES, WIDTH), tl.float32)
    top, total, mixed = fold(q, k.to(DTYPE), v.to(DTYPE), seen, scaling, top, total, mixed, MASKED=True)

    for i in range(0, number):
        at = ((piece + i * stride).to(tl.int64) * tl.num_programs(1) + kv_head) * LANES + lane
        here = tl.load(top_in + at)
        higher = tl.maximum(top, here)
        shrink, share = tl.exp2(top - higher), tl.exp2(here - higher)
        total = total * shrink + tl.load(total_in + at) * share
        mixed = mixed * shrink[:, None] + tl.load(mixed_in + at[:, None] * WIDTH + dim[None, :]) * share[:, None]
        top = higher
    tl.store(
        out + row[:, None] * out_row + head[:, None] * out_head + dim[None, :],
        (mixed / total[:, None]).to(out.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )
    tl.store(sums + head.to(tl.int64) * rows + row, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["contexts", "rows"])
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
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CONTEXT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What the heads of one group take from a block of context."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(blocks + 4 * block)
    length = tl.load(blocks + 4 * block + 1)
    first = tl.load(blocks + 4 * block + 2)
    count = tl.load(blocks + 4 * block + 3)
    place, lane, dim = tl.arange(0, CONTEXT), tl.arange(0, ROWS), tl.arange(0, WIDTH)
    here, live, inside = place < length, lane < count, dim < DIM
    slot = tl.load(slots + begin + place, mask=here, other=0)
    row = (first + lane).to(tl.int64)
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
    at = kv_head.to(tl.int64) * contexts + begin + place
    tl.store(scores + at, taken * tl.load(sizes + at, mask=here, other=0.0), mask=here)


def probe_attention(
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
            (:func:`a3_sglang.attention.relevance.relevance`).

    Returns:
        (rows, heads, head_dim), dtype of ``query``.
    """
    heads, dim = query.shape[1:]
    kv_heads, contexts = keys.shape[1], len(layout.slots)
    width = padded(dim)
    shares, device = (len(layout.pieces), kv_heads, LANES), query.device
    out = torch.empty(query.shape, dtype=query.dtype, device=device)
    mixed = torch.empty((*shares, width), device=device)
    top, total = torch.empty(shares, device=device), torch.empty(shares, device=device)
    sizes, taken = (torch.empty((kv_heads, contexts), device=device) for _ in range(2))
    sums = torch.empty((heads, layout.rows), device=device)
    own_keys, own_values = own
    ranked = scores is not None and contexts > 0
    shape = {"GROUP": heads // kv_heads, "DIM": dim, "WIDTH": width, "DTYPE": product_dtype(query)}
    if contexts:
        _attend[(len(layout.pieces), kv_heads)](
            query,
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
            *keys.stride()[:2],
            *values.stride()[:2],
            LANES=LANES,
            CONTEXT=BLOCK if has_wide_products() else BLOCK // 2,
            SIZED=ranked,
            num_warps=8,
            num_stages=3,
            **shape,
        )
    _join[(len(layout.tiles), kv_heads)](
        query,
        own_keys,
        own_values,
        mixed,
        top,
        total,
        layout.tiles,
        out,
        sums,
        scaling * LOG2E,
        layout.rows,
        *query.stride()[:2],
        *own_keys.stride()[:2],
        *own_values.stride()[:2],
        *out.stride()[:2],
        LANES=LANES,
        OWN=ROWS,
        num_warps=8,
        **shape,
    )
    if ranked:
        _rank[(len(layout.blocks), kv_heads)](
            query,
            keys,
            layout.blocks,
            layout.slots,
            sums,
            sizes,
            taken,
            scaling * LOG2E,
            contexts,
            layout.rows,
            *query.stride()[:2],
            *keys.stride()[:2],
            ROWS=ROWS,
            CONTEXT=BLOCK,
            num_warps=4,
            num_stages=2,
            **shape,
        )
        scores += taken.sum(0)
    return out
