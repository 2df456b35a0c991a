"""Corrects the reused rows between recomputed ones by their predicted drift, in place; two launches per layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import INTERPRETED, product_dtype, rotary_columns, tile_width
from a3_sglang.kernels.drift_weights import COLUMNS, WIDTH_UNIT, Blocks, observed_range
from a3_sglang.rope import Rotation

OBSERVED_PER_PROGRAM = 16
"""Rows of the pass whose drift one program computes, of one head."""
CORRECTED_PER_PROGRAM = 64
"""Reused rows that one program corrects, of one head."""
OBSERVED_PER_STEP = WIDTH_UNIT
"""Observed rows that a correcting program reads per step."""


@triton.jit(do_not_specialize=["count"])
def _observe_drift_kernel(
    keys,
    values,
    fresh_keys,
    fresh_values,
    rows,
    slots,
    cos,
    sin,
    key_drift,
    value_drift,
    count,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_fkm,
    stride_fkh,
    stride_fvm,
    stride_fvh,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NEOX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Drift of the pass's rows, for one head: fresh minus copied KV, keys rotated to position 0.

    Rows of gaps have none: nothing was copied to their slots, and nothing reads what is written for them here. Grid:
    (blocks of rows, heads).
    """
    head = tl.program_id(1)
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = offs_m < count
    row = tl.load(rows + offs_m, mask=mask_m, other=0)
    slot = tl.load(slots + offs_m, mask=mask_m, other=0)

    # Values.
    offs_out = (offs_m * tl.num_programs(1) + head)[:, None] * DIM
    offs_d, pair = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_R)[None, :]
    copied = values + slot[:, None] * stride_vn + head * stride_vh
    fresh = fresh_values + row[:, None] * stride_fvm + head * stride_fvh
    mask_md = mask_m[:, None] & (offs_d < DIM)
    drift = tl.load(fresh + offs_d, mask=mask_md, other=0.0).to(tl.float32)
    drift -= tl.load(copied + offs_d, mask=mask_md, other=0.0).to(tl.float32)
    tl.store(value_drift + offs_out + offs_d, drift.to(value_drift.dtype.element_ty), mask=mask_md)

    # Rotary dimensions of the keys.
    copied = keys + slot[:, None] * stride_kn + head * stride_kh
    fresh = fresh_keys + row[:, None] * stride_fkm + head * stride_fkh
    first, second = rotary_columns(pair, HALF, NEOX)
    mask_mr = mask_m[:, None] & (pair < HALF)
    a = tl.load(fresh + first, mask=mask_mr, other=0.0).to(tl.float32)
    a -= tl.load(copied + first, mask=mask_mr, other=0.0).to(tl.float32)
    b = tl.load(fresh + second, mask=mask_mr, other=0.0).to(tl.float32)
    b -= tl.load(copied + second, mask=mask_mr, other=0.0).to(tl.float32)
    c = tl.load(cos + offs_m[:, None] * HALF + pair, mask=mask_mr, other=0.0)
    s = tl.load(sin + offs_m[:, None] * HALF + pair, mask=mask_mr, other=0.0)
    tl.store(key_drift + offs_out + first, (a * c - b * s).to(key_drift.dtype.element_ty), mask=mask_mr)
    tl.store(key_drift + offs_out + second, (b * c + a * s).to(key_drift.dtype.element_ty), mask=mask_mr)
    # Their other dimensions.
    if 2 * HALF < DIM:
        mask_md = mask_m[:, None] & ((offs_d >= 2 * HALF) & (offs_d < DIM))
        drift = tl.load(fresh + offs_d, mask=mask_md, other=0.0).to(tl.float32)
        drift -= tl.load(copied + offs_d, mask=mask_md, other=0.0).to(tl.float32)
        tl.store(key_drift + offs_out + offs_d, drift.to(key_drift.dtype.element_ty), mask=mask_md)


@triton.jit(do_not_specialize=["size"])
def _correct_drift_kernel(
    keys,
    values,
    key_drift,
    value_drift,
    key_weights,
    value_weights,
    table,
    bounds,
    slots,
    cos,
    sin,
    size,
    width,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NEOX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of a block's rows plus the weighted drift of the block's observed rows, for one head.

    Grid: (tiles of a block, blocks, heads).
    """
    block, head = tl.program_id(1), tl.program_id(2)
    entry = table + COLUMNS * block
    first_observed, count = observed_range(bounds, block, tl.num_programs(1), width)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Without an observed row there is nothing to correct.
    mask_m = offs_m < tl.where(count > 0, tl.load(entry + 1), 0)
    slot = tl.load(slots + tl.load(entry) + offs_m, mask=mask_m, other=0)
    row = (tl.load(entry + 3) + offs_m).to(tl.int64)
    cell = (block * size + offs_m).to(tl.int64)

    offs_d, pair = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_R)[None, :]
    mask_d, mask_r = offs_d < DIM, pair < HALF
    first, second = rotary_columns(pair, HALF, NEOX)
    acc_v = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Keys: the two dimensions of each rotary pair, and the dimensions that are not rotated.
    acc_a = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc_b = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc_unrotated = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    mask_unrotated = (offs_d >= 2 * HALF) & mask_d
    # Predict: weights (BLOCK_M, BLOCK_N) times drift (BLOCK_N, dimensions). Weights are padded with zeros.
    for begin in range(0, count, BLOCK_N):
        offs_n = begin + tl.arange(0, BLOCK_N)
        mask_n = (offs_n < count)[:, None]
        offs_drift = ((first_observed + offs_n) * tl.num_programs(2) + head)[:, None] * DIM
        offs_weight = cell[:, None] * width + offs_n[None, :]
        w = tl.load(value_weights + offs_weight, mask=mask_m[:, None], other=0.0).to(DTYPE)
        drift = tl.load(value_drift + offs_drift + offs_d, mask=mask_n & mask_d, other=0.0).to(DTYPE)
        acc_v += tl.dot(w, drift, input_precision=PRECISION)
        w = tl.load(key_weights + offs_weight, mask=mask_m[:, None], other=0.0).to(DTYPE)
        drift = tl.load(key_drift + offs_drift + first, mask=mask_n & mask_r, other=0.0).to(DTYPE)
        acc_a += tl.dot(w, drift, input_precision=PRECISION)
        drift = tl.load(key_drift + offs_drift + second, mask=mask_n & mask_r, other=0.0).to(DTYPE)
        acc_b += tl.dot(w, drift, input_precision=PRECISION)
        if 2 * HALF < DIM:
            drift = tl.load(key_drift + offs_drift + offs_d, mask=mask_n & mask_unrotated, other=0.0).to(DTYPE)
            acc_unrotated += tl.dot(w, drift, input_precision=PRECISION)

    # Add to the values.
    mask_md = mask_m[:, None] & mask_d
    target = values + slot[:, None] * stride_vn + head * stride_vh + offs_d
    acc_v += tl.load(target, mask=mask_md, other=0.0).to(tl.float32)
    tl.store(target, acc_v.to(values.dtype.element_ty), mask=mask_md)

    # Rotate to the rows' positions and add to the keys.
    target = keys + slot[:, None] * stride_kn + head * stride_kh
    mask_mr = mask_m[:, None] & mask_r
    c = tl.load(cos + row[:, None] * HALF + pair, mask=mask_mr, other=0.0)
    s = tl.load(sin + row[:, None] * HALF + pair, mask=mask_mr, other=0.0)
    new_a = tl.load(target + first, mask=mask_mr, other=0.0).to(tl.float32) + acc_a * c - acc_b * s
    new_b = tl.load(target + second, mask=mask_mr, other=0.0).to(tl.float32) + acc_b * c + acc_a * s
    tl.store(target + first, new_a.to(keys.dtype.element_ty), mask=mask_mr)
    tl.store(target + second, new_b.to(keys.dtype.element_ty), mask=mask_mr)
    if 2 * HALF < DIM:
        mask_md = mask_m[:, None] & mask_unrotated
        acc_unrotated += tl.load(target + offs_d, mask=mask_md, other=0.0).to(tl.float32)
        tl.store(target + offs_d, acc_unrotated.to(keys.dtype.element_ty), mask=mask_md)


def correct_drift(
    keys: torch.Tensor,
    values: torch.Tensor,
    fresh_keys: torch.Tensor,
    fresh_values: torch.Tensor,
    *,
    blocks: Blocks,
    observed_rows: torch.Tensor,
    observed_slots: torch.Tensor,
    slots: torch.Tensor,
    key_weights: torch.Tensor,
    value_weights: torch.Tensor,
    to_zero: Rotation,
    from_zero: Rotation,
    neox: bool,
) -> None:
    """Correct one layer's reused rows in place by the drift of the pass's rows.

    Drift is rounded to the dtype of the pools, like the weights; sums are in float32.

    Args:
        keys: of the layer, (slots, heads, head_dim), fp16, bf16 or fp32; the last dimension is contiguous, here and
            below.
        values: like ``keys``.
        fresh_keys: of the pass, (rows, heads, head_dim), after RoPE.
        fresh_values: like ``fresh_keys``.
        blocks: the blocks of all requests, and which rows are observed in them.
        observed_rows: int64 (n,), rows of the pass that ``blocks.observed_pos`` gives the positions of.
        observed_slots: int64 (n,), their slots, which still hold the copied KV.
        slots: int64, slot of each position, request after request.
        key_weights: see :func:`a3_sglang.kernels.drift_weights.kriging_weights`.
        value_weights: like ``key_weights``.
        to_zero: rotation of the n rows to position 0.
        from_zero: rotation of the reused rows from position 0 to their positions.
        neox: pairing of the rotary dimensions, see :class:`a3_sglang.rope.RopeTable`.
    """
    heads, dim = keys.shape[1:]
    count, half = to_zero.cos.shape
    if not count * len(blocks.table):
        return
    key_drift, value_drift = (torch.empty((count, heads, dim), dtype=keys.dtype, device=keys.device) for _ in "kv")
    shape = {
        "DIM": dim,
        "BLOCK_D": tile_width(dim),
        "HALF": half,
        "BLOCK_R": tile_width(half),
        "NEOX": neox,
    }
    _observe_drift_kernel[(triton.cdiv(count, OBSERVED_PER_PROGRAM), heads)](
        keys,
        values,
        fresh_keys,
        fresh_values,
        observed_rows,
        observed_slots,
        to_zero.cos,
        to_zero.sin,
        key_drift,
        value_drift,
        count,
        *keys.stride()[:2],
        *values.stride()[:2],
        *fresh_keys.stride()[:2],
        *fresh_values.stride()[:2],
        BLOCK_M=OBSERVED_PER_PROGRAM,
        num_warps=4,
        **shape,
    )
    _correct_drift_kernel[(triton.cdiv(blocks.size, CORRECTED_PER_PROGRAM), len(blocks.table), heads)](
        keys,
        values,
        key_drift,
        value_drift,
        key_weights,
        value_weights,
        blocks.table,
        blocks.bounds,
        slots,
        from_zero.cos,
        from_zero.sin,
        blocks.size,
        blocks.width,
        *keys.stride()[:2],
        *values.stride()[:2],
        BLOCK_M=CORRECTED_PER_PROGRAM,
        BLOCK_N=OBSERVED_PER_STEP,
        DTYPE=product_dtype(keys),
        PRECISION="ieee" if INTERPRETED else "tf32",
        num_warps=8,
        **shape,
    )
