"""What the attention kernels share: how rows are laid out in a program, and a step of online softmax."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
"""Exponentials are to base 2, so logits are multiplied with log2(e)."""

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def padded(dim: int) -> int:
    """Width of a tile that holds a head."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def lanes(first, count, kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The heads of a group side by side: row and head of each lane, and whether there is such a row."""
    lane = tl.arange(0, ROWS)
    return (first + lane // GROUP).to(tl.int64), kv_head * GROUP + lane % GROUP, lane // GROUP < count


@triton.jit
def queries(query, row, head, live, row_stride, head_stride, dim, inside, DTYPE: tl.constexpr):
    """The query of each lane, zero where there is no row."""
    at = query + row[:, None] * row_stride + head[:, None] * head_stride + dim[None, :]
    return tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(DTYPE)


@triton.jit
def columns(pair, HALF: tl.constexpr, NEOX: tl.constexpr):
    """Where the two dimensions of each rotated pair stand: in the halves, or beside each other."""
    return (pair, HALF + pair) if NEOX else (2 * pair, 2 * pair + 1)


@triton.jit
def fold(q, k, v, seen, scaling, top, total, mixed, MASKED: tl.constexpr):
    """One step of online softmax (FlashAttention-2, arXiv 2307.08691, Algorithm 1).

    Over the keys that are ``seen``; where nothing is ``MASKED``, over all.
    """
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    shrink, weights = tl.exp2(top - higher), tl.exp2(logits - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total, mixed


INTERPRETED = not isinstance(fold, triton.JITFunction)


def product_dtype(query: torch.Tensor) -> Any:
    """What matrix products take; the interpreter multiplies bf16 wrongly."""
    return tl.float32 if INTERPRETED else DTYPES[query.dtype]


def has_wide_products() -> bool:
    """Whether a matrix product takes its factors from shared memory (Hopper, data centre's Blackwell).

    Others keep them in registers, of which blocks of 64 positions then need more than there are.
    """
    return INTERPRETED or triton.runtime.driver.active.get_current_target().arch // 10 in (9, 10)
