"""Relevance of a probe's context, from the log-sum-exp of its rows; the second read of the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.attention_spec import AttentionSpec
from a3_sglang.kernels.common import (
    attention_logits,
    logit_arguments,
    product_dtype,
    tile_width,
    window_arguments,
)
from a3_sglang.kernels.probe_layout import MAX_ROWS, POSITIONS, Layout, Scratch


@triton.jit(do_not_specialize=["contexts", "rows", "request_count"])
def _probe_relevance_kernel(
    query,
    keys,
    requests,
    slots,
    context_pos,
    row_pos,
    lse,
    value_norms,
    scores,
    contexts,
    rows,
    request_count,
    stride_qm,
    stride_qh,
    stride_kn,
    stride_kh,
    scaling,
    cap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Add the relevance of a block of context to its request's probe, all heads. Grid: (blocks,).

    Keys are read and multiplied again: keeping the attention of all rows would take rows x context x heads floats.
    """
    block = tl.program_id(0)
    request = 0
    for other in range(1, request_count):
        request += (block >= tl.load(requests + 5 * other)).to(tl.int32)
    entry = requests + 5 * request
    begin = (block - tl.load(entry)) * BLOCK_N
    first_position, length = tl.load(entry + 1) + begin, tl.load(entry + 2) - begin
    first_row, row_count = tl.load(entry + 3), tl.load(entry + 4)

    offs_n, offs_m, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_n, mask_m, mask_d = offs_n < length, offs_m < row_count, offs_d < DIM
    slot = tl.load(slots + first_position + offs_n, mask=mask_n, other=0)
    row = (first_row + offs_m).to(tl.int64)
    if WINDOWED:
        position = tl.load(context_pos + first_position + offs_n, mask=mask_n, other=0)
        seen_from = tl.load(row_pos + row, mask=mask_m, other=0) - window
        visible = position[None, :] >= seen_from[:, None]
    total = tl.zeros((BLOCK_N,), tl.float32)
    for kv_head in range(KV_HEADS):
        k = tl.load(
            keys + slot[:, None] * stride_kn + kv_head * stride_kh + offs_d[None, :],
            mask=mask_n[:, None] & mask_d[None, :],
            other=0.0,
        ).to(DTYPE)
        # Mean or root mean square of the attention over the probe's rows, summed over the heads of the group.
        attention = tl.zeros((BLOCK_N,), tl.float32)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q = tl.load(
                query + row[:, None] * stride_qm + head * stride_qh + offs_d[None, :],
                mask=mask_m[:, None] & mask_d[None, :],
                other=0.0,
            ).to(DTYPE)
            row_lse = tl.load(lse + head * rows + row, mask=mask_m, other=float("inf"))
            p = tl.exp2(attention_logits(q, k, scaling, cap, CAPPED) - row_lse[:, None])
            if WINDOWED:
                p = tl.where(visible, p, 0.0)
            if MEAN:
                attention += tl.sum(p, 0) / row_count
            else:
                attention += tl.sqrt(tl.sum(p * p, 0) / row_count)
        if not MEAN:
            # Times the norm of the value, which is written only for positions that a row attends to.
            offs_norm = kv_head * contexts.to(tl.int64) + first_position + offs_n
            attention *= tl.load(value_norms + offs_norm, mask=mask_n & (attention != 0.0), other=0.0)
        total += attention
    score = scores + first_position + offs_n
    tl.store(score, tl.load(score, mask=mask_n, other=0.0) + total, mask=mask_n)


def add_relevance(
    query: torch.Tensor,
    keys: torch.Tensor,
    layout: Layout,
    scratch: Scratch,
    spec: AttentionSpec,
    scores: torch.Tensor,
    mean: bool,
) -> None:
    """Add the relevance of each context position to ``scores``, float32 (sum of contexts,).

    The rest is as in :func:`a3_sglang.kernels.probe_attention.probe_attention`, which comes first and leaves what is
    needed here in ``scratch``.
    """
    heads, dim = query.shape[1:]
    kv_heads = keys.shape[1]
    _probe_relevance_kernel[(layout.blocks,)](
        query,
        keys,
        layout.requests,
        layout.slots,
        layout.context_pos,
        layout.row_pos,
        scratch.lse,
        scratch.value_norms,
        scores,
        len(layout.slots),
        layout.rows,
        len(layout.requests),
        *query.stride()[:2],
        *keys.stride()[:2],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_D=tile_width(dim),
        BLOCK_M=MAX_ROWS,
        BLOCK_N=POSITIONS,
        DTYPE=product_dtype(query),
        MEAN=mean,
        **logit_arguments(spec),
        **window_arguments(spec),
        num_warps=4,
        num_stages=2,
    )
