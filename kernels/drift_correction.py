"""Takes the drift that recomputed rows show off the reused rows between them, in place; two launches a layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import INTERPRETED, columns, padded

Pair = tuple[torch.Tensor, torch.Tensor]

SEEN = 16
"""Rows of the pass that one program takes, of one head."""
ROWS = 64
"""Reused rows that one program takes, of one head."""
KNOWN = 32
"""Known rows that a program reads at a time."""


@triton.jit(do_not_specialize=["count"])
def _observe(
    keys,
    values,
    fresh_keys,
    fresh_values,
    rows,
    slots,
    real,
    cos,
    sin,
    key_drift,
    value_drift,
    count,
    key_slot,
    key_head,
    value_slot,
    value_head,
    fresh_key_row,
    fresh_key_head,
    fresh_value_row,
    fresh_value_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NEOX: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the rows of the pass show: fresh less copied, keys turned back to position 0; zero where not ``real``."""
    head = tl.program_id(1)
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = i < count
    row = tl.load(rows + i, mask=live, other=0)
    slot = tl.load(slots + i, mask=live, other=0)
    shown = live & (tl.load(real + i, mask=live, other=0) != 0)

    at = (i * tl.num_programs(1) + head)[:, None] * DIM
    dim, pair = tl.arange(0, WIDTH)[None, :], tl.arange(0, PAIRS)[None, :]
    stale = values + slot[:, None] * value_slot + head * value_head
    fresh = fresh_values + row[:, None] * fresh_value_row + head * fresh_value_head
    some = shown[:, None] & (dim < DIM)
    drift = tl.load(fresh + dim, mask=some, other=0.0).to(tl.float32)
    drift -= tl.load(stale + dim, mask=some, other=0.0).to(tl.float32)
    tl.store(value_drift + at + dim, drift, mask=live[:, None] & (dim < DIM))

    stale = keys + slot[:, None] * key_slot + head * key_head
    fresh = fresh_keys + row[:, None] * fresh_key_row + head * fresh_key_head
    first, second = columns(pair, HALF, NEOX)
    some = shown[:, None] & (pair < HALF)
    a = tl.load(fresh + first, mask=some, other=0.0).to(tl.float32)
    a -= tl.load(stale + first, mask=some, other=0.0).to(tl.float32)
    b = tl.load(fresh + second, mask=some, other=0.0).to(tl.float32)
    b -= tl.load(stale + second, mask=some, other=0.0).to(tl.float32)
    c = tl.load(cos + i[:, None] * HALF + pair, mask=some, other=0.0)
    s = tl.load(sin + i[:, None] * HALF + pair, mask=some, other=0.0)
    every = live[:, None] & (pair < HALF)
    tl.store(key_drift + at + first, a * c - b * s, mask=every)
    tl.store(key_drift + at + second, b * c + a * s, mask=every)
    if 2 * HALF < DIM:
        rest = (dim >= 2 * HALF) & (dim < DIM)
        drift = tl.load(fresh + dim, mask=shown[:, None] & rest, other=0.0).to(tl.float32)
        drift -= tl.load(stale + dim, mask=shown[:, None] & rest, other=0.0).to(tl.float32)
        tl.store(key_drift + at + dim, drift, mask=live[:, None] & rest)


@triton.jit(do_not_specialize=["size", "width"])
def _correct(
    keys,
    values,
    key_drift,
    value_drift,
    key_weights,
    value_weights,
    source,
    number,
    slots,
    cos,
    sin,
    size,
    width,
    key_slot,
    key_head,
    value_slot,
    value_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NEOX: tl.constexpr,
    ROWS: tl.constexpr,
    KNOWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to a tile of a block's rows what the block's known ones tell of them."""
    block, head = tl.program_id(1), tl.program_id(2)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = place < size
    at = (block * size + place).to(tl.int64)
    row = tl.load(number + at, mask=here, other=-1)
    live = row >= 0
    slot = tl.load(slots + row, mask=live, other=0)

    dim, pair = tl.arange(0, WIDTH)[None, :], tl.arange(0, PAIRS)[None, :]
    inside, turned = dim < DIM, pair < HALF
    first, second = columns(pair, HALF, NEOX)
    value = tl.zeros((ROWS, WIDTH), tl.float32)
    a = tl.zeros((ROWS, PAIRS), tl.float32)
    b = tl.zeros((ROWS, PAIRS), tl.float32)
    rest = tl.zeros((ROWS, WIDTH), tl.float32)
    kept = (dim >= 2 * HALF) & inside
    for begin in range(0, width, KNOWN):
        column = begin + tl.arange(0, KNOWN)
        known = column < width
        told = tl.load(source + block * width + column, mask=known, other=0)
        from_row = (told * tl.num_programs(2) + head)[:, None] * DIM
        weight = at[:, None] * width + column[None, :]
        real = live[:, None] & known[None, :]
        w = tl.load(value_weights + weight, mask=real, other=0.0)
        drift = tl.load(value_drift + from_row + dim, mask=known[:, None] & inside, other=0.0)
        value += tl.dot(w, drift, input_precision=PRECISION)
        w = tl.load(key_weights + weight, mask=real, other=0.0)
        drift = tl.load(key_drift + from_row + first, mask=known[:, None] & turned, other=0.0)
        a += tl.dot(w, drift, input_precision=PRECISION)
        drift = tl.load(key_drift + from_row + second, mask=known[:, None] & turned, other=0.0)
        b += tl.dot(w, drift, input_precision=PRECISION)
        if 2 * HALF < DIM:
            drift = tl.load(key_drift + from_row + dim, mask=known[:, None] & kept, other=0.0)
            rest += tl.dot(w, drift, input_precision=PRECISION)

    some = live[:, None] & inside
    target = values + slot[:, None] * value_slot + head * value_head + dim
    value += tl.load(target, mask=some, other=0.0).to(tl.float32)
    tl.store(target, value.to(values.dtype.element_ty), mask=some)

    target = keys + slot[:, None] * key_slot + head * key_head
    some = live[:, None] & turned
    c = tl.load(cos + row[:, None] * HALF + pair, mask=some, other=0.0)
    s = tl.load(sin + row[:, None] * HALF + pair, mask=some, other=0.0)
    one = tl.load(target + first, mask=some, other=0.0).to(tl.float32) + a * c - b * s
    other = tl.load(target + second, mask=some, other=0.0).to(tl.float32) + b * c + a * s
    tl.store(target + first, one.to(keys.dtype.element_ty), mask=some)
    tl.store(target + second, other.to(keys.dtype.element_ty), mask=some)
    if 2 * HALF < DIM:
        some = live[:, None] & kept
        rest += tl.load(target + dim, mask=some, other=0.0).to(tl.float32)
        tl.store(target + dim, rest.to(keys.dtype.element_ty), mask=some)


def correct_drift(
    pools: Pair,
    fresh: Pair,
    pass_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    weights: Pair,
    places: Pair,
    turns: tuple[Pair, Pair],
    neox: bool,
) -> None:
    """Correct one layer's reused rows in place by what the pass's rows show; sums in float32 (TF32 factors on a GPU).

    Args:
        pools: keys and values of the layer, each (slots, heads, head_dim), fp16, bf16 or fp32; the last dimension is
            contiguous, here and below.
        fresh: keys and values of the pass, each (rows, heads, head_dim), keys after RoPE.
        pass_rows: int64, int64 and bool (n,): rows of the pass, their slots, and whether they tell anything.
        slots: int64 (reused,).
        weights: of keys and values, each float32 (blocks, size, width), contiguous: what each row of a block takes
            from its known ones.
        places: int64 (blocks, width), which of the n rows these are, and int64 (blocks, size), which of the reused
            rows stands where, -1 for none.
        turns: cosine and sine that take the n rows' keys to position 0, each float32 (n, rotary_dim / 2), and the
            reused rows' from there to their positions, each float32 (reused, rotary_dim / 2), contiguous.
        neox: halves of the turned dimensions are paired (True), or neighbours are (False).
    """
    (keys, values), (back, forth), (source, number) = pools, turns, places
    heads, dim = keys.shape[1:]
    count, half = back[0].shape
    blocks, size, width = weights[0].shape
    if not count * blocks * size * width:
        return
    key_drift, value_drift = (torch.empty((count, heads, dim), device=keys.device) for _ in "kv")
    shape = {
        "DIM": dim,
        "WIDTH": padded(dim),
        "HALF": half,
        "PAIRS": padded(half),
        "NEOX": neox,
    }
    strides = *keys.stride()[:2], *values.stride()[:2]
    _observe[(triton.cdiv(count, SEEN), heads)](
        keys,
        values,
        *fresh,
        *pass_rows,
        *back,
        key_drift,
        value_drift,
        count,
        *strides,
        *fresh[0].stride()[:2],
        *fresh[1].stride()[:2],
        ROWS=SEEN,
        num_warps=4,
        **shape,
    )
    _correct[(triton.cdiv(size, ROWS), blocks, heads)](
        keys,
        values,
        key_drift,
        value_drift,
        *weights,
        source,
        number,
        slots,
        *forth,
        size,
        width,
        *strides,
        ROWS=ROWS,
        KNOWN=KNOWN,
        PRECISION="ieee" if INTERPRETED else "tf32",
        num_warps=8,
        **shape,
    )
