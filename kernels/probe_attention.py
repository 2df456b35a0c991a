"""The probe's attention over paged KV, and the relevance of each context position; several requests in one launch.

Two passes over the keys. The first one attends: each program takes a piece of one request's context and writes its
partial output, maximum and sum; a small kernel attends over the probe's own rows and merges the pieces (split softmax
as in FlashDecoding). The second pass reads the keys again with each row's log-sum-exp, and computes relevance without
ever writing the attention matrix: a context's keys of one layer are small and mostly still in the L2 cache, the matrix
would have rows x heads x context floats. There are no atomic additions, so results do not depend on the order of
programs.
"""

from __future__ import annotations

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
from a3_sglang.kernels.probe_layout import LANES, MAX_ROWS, POSITIONS, Layout, Scratch
from a3_sglang.kernels.probe_relevance import add_relevance

MERGED_LANES = 32
"""Lanes of a tile that one program merges; so few, because a probe has only a tile or two per KV head."""


@triton.jit(do_not_specialize=["contexts"])
def _probe_split_kernel(
    query,
    keys,
    values,
    pieces,
    slots,
    context_pos,
    row_pos,
    acc_out,
    m_out,
    l_out,
    value_norms,
    contexts,
    stride_qm,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    scaling,
    cap,
    window,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    WRITE_NORMS: tl.constexpr,
):
    """A tile of a probe over a piece of its context: partial output and softmax state, and the norms of the values.

    Grid: (pieces, kv_heads).
    """
    piece, kv_head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(pieces + 4 * piece)
    row_count = tl.load(pieces + 4 * piece + 1)
    first_position = tl.load(pieces + 4 * piece + 2)
    length = tl.load(pieces + 4 * piece + 3)

    # Load the queries.
    row, head, mask_m = query_lanes(first_row, row_count, kv_head, 0, GROUP, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < DIM
    q = load_queries(query, row, head, mask_m, stride_qm, stride_qh, offs_d, mask_d, DTYPE)

    # Find the first position that a row attends to.
    first = 0
    if WINDOWED:
        seen_from = tl.load(row_pos + row, mask=mask_m, other=0) - window
        lowest = tl.load(row_pos + first_row) - window
        end = length
        while first < end:
            middle = (first + end) // 2
            before = tl.load(context_pos + first_position + middle) < lowest
            first = tl.where(before, middle + 1, first)
            end = tl.where(before, end, middle)

    # Attend to the piece.
    m_i, l_i, acc = start_softmax(BLOCK_M, BLOCK_D)
    keys += kv_head * stride_kh + offs_d[None, :]
    values += kv_head * stride_vh + offs_d[None, :]
    for begin in range(first, length, BLOCK_N):
        offs_n = begin + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        mask_nd = mask_n[:, None] & mask_d[None, :]
        slot = tl.load(slots + first_position + offs_n, mask=mask_n, other=0)
        k = tl.load(keys + slot[:, None] * stride_kn, mask=mask_nd, other=0.0).to(DTYPE)
        v = tl.load(values + slot[:, None] * stride_vn, mask=mask_nd, other=0.0).to(DTYPE)
        if WRITE_NORMS:  # All tiles of a request write the same here.
            norm = tl.sqrt(tl.sum(v.to(tl.float32) * v.to(tl.float32), 1))
            tl.store(value_norms + kv_head.to(tl.int64) * contexts + first_position + offs_n, norm, mask=mask_n)
        visible = mask_n[None, :]
        if WINDOWED:
            position = tl.load(context_pos + first_position + offs_n, mask=mask_n, other=0)
            visible = visible & (position[None, :] >= seen_from[:, None])
        m_i, l_i, acc = softmax_step(q, k, v, visible, scaling, cap, m_i, l_i, acc, CAPPED, MASKED=True)

    # Store the partial results.
    offs_state = (piece.to(tl.int64) * tl.num_programs(1) + kv_head) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(acc_out + offs_state[:, None] * BLOCK_D + offs_d[None, :], acc)
    tl.store(m_out + offs_state, m_i)
    tl.store(l_out + offs_state, l_i)


@triton.jit(do_not_specialize=["rows"])
def _probe_merge_kernel(
    query,
    own_keys,
    own_values,
    acc_in,
    m_in,
    l_in,
    tiles,
    row_pos,
    out,
    lse,
    rows,
    stride_qm,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_om,
    stride_oh,
    sinks,
    scaling,
    cap,
    window,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Lanes of a tile over the request's own rows, causally, merged with the tile's pieces; log-sum-exp of each row.

    Grid: (tiles, kv_heads, LANES / BLOCK_M).
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(tiles + 6 * tile)
    row_count = tl.load(tiles + 6 * tile + 1)
    request_row = tl.load(tiles + 6 * tile + 2)
    first_piece = tl.load(tiles + 6 * tile + 3)
    piece_count = tl.load(tiles + 6 * tile + 4)
    piece_step = tl.load(tiles + 6 * tile + 5)

    # Load the queries and the request's own keys and values.
    first_lane = tl.program_id(2) * BLOCK_M
    row, head, mask_m = query_lanes(first_row, row_count, kv_head, first_lane, GROUP, BLOCK_M)
    lane = first_lane + tl.arange(0, BLOCK_M)
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    mask_d = offs_d < DIM
    q = load_queries(query, row, head, mask_m, stride_qm, stride_qh, offs_d, mask_d, DTYPE)
    # No row of the tile attends to rows after the tile's last.
    own_row = (request_row + offs_n).to(tl.int64)
    mask_n = own_row < first_row + row_count
    mask_nd = mask_n[:, None] & mask_d[None, :]
    k = tl.load(
        own_keys + own_row[:, None] * stride_kn + kv_head * stride_kh + offs_d[None, :], mask=mask_nd, other=0.0
    )
    v = tl.load(
        own_values + own_row[:, None] * stride_vn + kv_head * stride_vh + offs_d[None, :], mask=mask_nd, other=0.0
    )

    # Attend to them. Lanes without a row attend to the first one, so that their softmax stays finite.
    visible = offs_n[None, :] <= tl.where(mask_m, row - request_row, 0)[:, None]
    if WINDOWED:
        position = tl.load(row_pos + own_row, mask=mask_n, other=0)
        seen_from = tl.load(row_pos + row, mask=mask_m, other=0) - window
        visible = visible & (position[None, :] >= seen_from[:, None])
    m_i, l_i, acc = start_softmax(BLOCK_M, BLOCK_D)
    k, v = k.to(DTYPE), v.to(DTYPE)
    m_i, l_i, acc = softmax_step(q, k, v, visible, scaling, cap, m_i, l_i, acc, CAPPED, MASKED=True)

    # Merge the pieces of the context.
    for i in range(0, piece_count):
        offs_state = ((first_piece + i * piece_step).to(tl.int64) * tl.num_programs(1) + kv_head) * LANES + lane
        m_piece = tl.load(m_in + offs_state)
        m_new = tl.maximum(m_i, m_piece)
        rescale, rescale_piece = tl.exp2(m_i - m_new), tl.exp2(m_piece - m_new)
        l_i = l_i * rescale + tl.load(l_in + offs_state) * rescale_piece
        acc_piece = tl.load(acc_in + offs_state[:, None] * BLOCK_D + offs_d[None, :])
        acc = acc * rescale[:, None] + acc_piece * rescale_piece[:, None]
        m_i = m_new

    # Add the sinks, normalize and store.
    if SINKS:
        m_i, l_i, acc = add_sinks(sinks, head, mask_m, m_i, l_i, acc)
    tl.store(
        out + row[:, None] * stride_om + head[:, None] * stride_oh + offs_d[None, :],
        (acc / l_i[:, None]).to(out.dtype.element_ty),
        mask=mask_m[:, None] & mask_d[None, :],
    )
    tl.store(lse + head.to(tl.int64) * rows + row, m_i + tl.log2(l_i), mask=mask_m)


def probe_attention(
    query: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    scratch: Scratch,
    spec: AttentionSpec,
    scores: torch.Tensor | None = None,
    mean: bool = False,
) -> torch.Tensor:
    """Attention of probes over their contexts and, causally, over their own rows; softmax in float32.

    Args:
        query: (rows, heads, head_dim), fp16, bf16 or fp32; the last dimension is contiguous, here and below.
        own_keys: of the rows, (rows, kv_heads, head_dim); they have no slots.
        own_values: like ``own_keys``.
        keys: (slots, kv_heads, head_dim), the dtype of ``query`` or fp8.
        values: like ``keys``.
        layout: see :func:`a3_sglang.kernels.probe_layout.make_layout`.
        scratch: see :func:`a3_sglang.kernels.probe_layout.make_scratch`; is overwritten.
        spec: how the layer attends.
        scores: float32 (sum of contexts,), to which the relevance of each position is added: over heads, the root mean
            square of the rows' attention to it times the norm of its value
            (:func:`a3_sglang.attention.relevance.relevance`).
        mean: relevance is the plain mean of the rows' attention instead.

    Returns:
        (rows, heads, head_dim), dtype of ``query``.
    """
    heads, dim = query.shape[1:]
    kv_heads, contexts = keys.shape[1], len(layout.slots)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    shape = {"GROUP": heads // kv_heads, "DIM": dim, "BLOCK_D": tile_width(dim), "DTYPE": product_dtype(query)}
    shape |= logit_arguments(spec) | window_arguments(spec)
    if contexts:
        _probe_split_kernel[(len(layout.pieces), kv_heads)](
            query,
            keys,
            values,
            layout.pieces,
            layout.slots,
            layout.context_pos,
            layout.row_pos,
            scratch.acc,
            scratch.m_i,
            scratch.l_i,
            scratch.value_norms,
            contexts,
            *query.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            BLOCK_M=LANES,
            BLOCK_N=POSITIONS if has_wide_products() else POSITIONS // 2,
            WRITE_NORMS=scores is not None and not mean,
            num_warps=8,
            # See TileShape in kernels/row_attention.py.
            num_stages=5,
            **shape,
        )
    _probe_merge_kernel[(len(layout.tiles), kv_heads, LANES // MERGED_LANES)](
        query,
        own_keys,
        own_values,
        scratch.acc,
        scratch.m_i,
        scratch.l_i,
        layout.tiles,
        layout.row_pos,
        out,
        scratch.lse,
        layout.rows,
        *query.stride()[:2],
        *own_keys.stride()[:2],
        *own_values.stride()[:2],
        *out.stride()[:2],
        LANES=LANES,
        BLOCK_M=MERGED_LANES,
        BLOCK_N=MAX_ROWS,
        num_warps=4,
        **sink_arguments(spec, unread=query),
        **shape,
    )
    if scores is not None and contexts:
        add_relevance(query, keys, layout, scratch, spec, scores, mean)
    return out
