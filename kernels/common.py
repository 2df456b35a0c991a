"""Parts that the kernels share: layout of query rows, loads, and one step of online softmax.

Names in the kernels of attention, copying and drift correction: ``BLOCK_M`` query lanes or rows, ``BLOCK_N`` context
positions or observed rows, ``BLOCK_D`` head dimensions and ``BLOCK_R`` rotary pairs of a tile; ``offs_*`` its indices,
``mask_*`` which of them exist; ``stride_xy`` the stride of tensor ``x`` along its axis ``y`` (slot, row or head; the
last axis is contiguous); ``acc``, ``m_i`` and ``l_i`` the running output, maximum and sum of the softmax. Logits, and
with them ``m_i``, are in units of log2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.attention_spec import AttentionSpec

LOG2E = 1.4426950408889634
"""Exponentials are to base 2, so logits are multiplied by log2(e)."""
LOG2E_CONSTANT = tl.constexpr(LOG2E)
"""The same constant, for use inside kernels."""

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def tile_width(dim: int) -> int:
    """Width of a tile that holds ``dim`` columns and can go through a matrix product."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def query_lanes(first_row, row_count, kv_head, first_lane, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row and head of each lane, and whether there is such a row; the heads of a GQA group are adjacent lanes."""
    lane = first_lane + tl.arange(0, BLOCK_M)
    return (first_row + lane // GROUP).to(tl.int64), kv_head * GROUP + lane % GROUP, lane // GROUP < row_count


@triton.jit
def load_queries(query, row, head, mask_m, stride_qm, stride_qh, offs_d, mask_d, DTYPE: tl.constexpr):
    """The query of each lane, zero if there is no row."""
    pointers = query + row[:, None] * stride_qm + head[:, None] * stride_qh + offs_d[None, :]
    return tl.load(pointers, mask=mask_m[:, None] & mask_d[None, :], other=0.0).to(DTYPE)


@triton.jit
def rotary_columns(pair, HALF: tl.constexpr, NEOX: tl.constexpr):
    """Columns of the two dimensions of each rotary pair: i and i + HALF (NeoX), or 2i and 2i + 1."""
    return (pair, HALF + pair) if NEOX else (2 * pair, 2 * pair + 1)


@triton.jit
def attention_logits(q, k, scaling, cap, CAPPED: tl.constexpr):
    """Logits in units of log2; see :func:`logit_arguments`."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if CAPPED:
        # The hyperbolic tangent: 2 sigmoid(2x) - 1.
        logits = cap * (2 * tl.sigmoid(2 * logits) - 1)
    return logits


@triton.jit
def start_softmax(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """``m_i``, ``l_i``, ``acc`` before the first step; a finite ``m_i`` allows steps without visible keys."""
    m_i = tl.full((BLOCK_M,), -1e38, tl.float32)
    return m_i, tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)


@triton.jit
def softmax_step(q, k, v, visible, scaling, cap, m_i, l_i, acc, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """One step of online softmax (FlashAttention-2, arXiv 2307.08691, Algorithm 1).

    Over the keys that are ``visible``; over all of them unless ``MASKED``.
    """
    logits = attention_logits(q, k, scaling, cap, CAPPED)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    rescale, p = tl.exp2(m_i - m_new), tl.exp2(logits - m_new[:, None])
    l_i = l_i * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, l_i, acc


@triton.jit
def add_sinks(sinks, head, mask_m, m_i, l_i, acc):
    """Add one logit per head, without a value, to the softmax (attention sinks)."""
    sink = tl.load(sinks + head, mask=mask_m, other=0.0).to(tl.float32) * LOG2E_CONSTANT
    m_new = tl.maximum(m_i, sink)
    rescale = tl.exp2(m_i - m_new)
    return m_new, l_i * rescale + tl.exp2(sink - m_new), acc * rescale[:, None]


def logit_arguments(spec: AttentionSpec) -> dict[str, Any]:
    """Arguments ``scaling``, ``cap`` and ``CAPPED`` of a kernel, for logits in units of log2."""
    cap = spec.logit_cap
    return {
        "scaling": spec.scaling / cap if cap else spec.scaling * LOG2E,
        "cap": cap * LOG2E,
        "CAPPED": bool(cap),
    }


def window_arguments(spec: AttentionSpec) -> dict[str, Any]:
    """Arguments ``window`` and ``WINDOWED`` of a kernel."""
    return {"window": spec.window or 0, "WINDOWED": spec.window is not None}


def sink_arguments(spec: AttentionSpec, unread: torch.Tensor) -> dict[str, Any]:
    """Arguments ``sinks`` and ``SINKS`` of a kernel; without sinks, ``unread`` is passed in their place."""
    return {"sinks": unread if spec.sinks is None else spec.sinks, "SINKS": spec.sinks is not None}


INTERPRETED = not isinstance(softmax_step, triton.JITFunction)


def product_dtype(query: torch.Tensor) -> Any:
    """Dtype of the factors of matrix products; the interpreter multiplies bf16 incorrectly, so it gets float32."""
    return tl.float32 if INTERPRETED else DTYPES[query.dtype]


def has_wide_products() -> bool:
    """Whether matrix products read their factors from shared memory (Hopper, data centre Blackwell).

    Other GPUs keep them in registers, and blocks of 64 positions would spill.
    """
    return INTERPRETED or triton.runtime.driver.active.get_current_target().arch // 10 in (9, 10)
