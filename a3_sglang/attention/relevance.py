"""Attention weights on a CPU, and how relevant each context position is to the probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


def key_columns(keys: torch.Tensor) -> torch.Tensor:
    """Keys in the layout of :func:`attention_weights`, with which its matrix product is fastest.

    Args:
        keys: (n, kv_heads, head_dim).

    Returns:
        float32 (kv_heads, head_dim, n), contiguous.
    """
    return keys.movedim(0, 1).contiguous().transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class CausalMask:
    """Which of the first ``end`` columns each row does not attend to; all rows attend to those before ``begin``.

    Attributes:
        begin, end: columns.
        hidden: bool (rows, end - begin).
    """

    begin: int
    end: int
    hidden: torch.Tensor


def causal_mask(kv_lens: torch.Tensor) -> CausalMask:
    """The mask of rows that attend to the first ``kv_lens`` columns, up to the longest of them.

    Args:
        kv_lens: int64 (rows,), at least 1.
    """
    begin, end = int(kv_lens.min()), int(kv_lens.max())
    return CausalMask(begin, end, torch.arange(begin, end, device=kv_lens.device) >= kv_lens[:, None])


def query_rows(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Queries in the layout of :func:`attention_weights`: the heads that share a KV head as further rows.

    Args:
        query: (rows, heads, head_dim).
        kv_heads: KV heads.

    Returns:
        float32 (kv_heads, rows * group, head_dim); the heads of a row are adjacent.
    """
    rows, heads, dim = query.shape
    return query.view(rows, kv_heads, heads // kv_heads, dim).movedim(1, 0).flatten(1, 2).float()


def attention_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    mask: CausalMask,
    scaling: float,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of rows over their context, for one KV head; sums and softmax in float32.

    It takes one head at a time, since its logits fit into the CPU's cache and a batched product takes longer.

    Args:
        query: float32 (rows * group, head_dim), see :func:`query_rows`.
        keys: float32 (head_dim, n), see :func:`key_columns`.
        mask: of the rows; ``mask.end`` is n.
        scaling: factor of the logits.
        dtype: that all values of queries and keys can be represented in.
        out: float32, contiguous, rows * group * n elements; receives the result.

    Returns:
        float32 (rows * group, n).
    """
    rows, n = len(query), keys.shape[1]
    logits = torch.empty(rows, n, device=query.device) if out is None else out.view(rows, n)
    with _matmul_precision(dtype):
        torch.addmm(logits, query, keys, beta=0, alpha=scaling, out=logits)
    logits.view(len(mask.hidden), -1, n)[..., mask.begin :].masked_fill_(mask.hidden[:, None], float("-inf"))
    return torch.softmax(logits, dim=-1, out=logits)


@contextmanager
def _matmul_precision(dtype: torch.dtype) -> Iterator[None]:
    """Run float32 products in a CPU's bf16 units if ``dtype`` is bf16: factors are rounded to it, sums are float32."""
    backend: Any = torch.backends.mkldnn  # Its stubs lack the attribute.
    matmul = backend.matmul
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def relevance(weights: torch.Tensor, rows: int, values: torch.Tensor, mean: bool = False) -> torch.Tensor:
    """Relevance of each position: root mean square of the rows' attention to it, times the norm of its value.

    The mean square favours positions that few of the probe's rows attend to strongly. A position with a small value
    adds little to the output however much attention it gets (attention sinks are such).

    Args:
        weights: of the probe's rows from :func:`attention_weights`, (rows * group, n); squared in place.
        rows: number of rows.
        values: (n, head_dim).
        mean: relevance is the plain mean of the rows' attention instead, as in published work.

    Returns:
        float32 (n,), summed over the heads of the group.
    """
    if mean:
        return weights.sum(0).div_(rows)
    # Nine times as fast on a CPU as a norm over the first dimension.
    per_head = weights.square_().view(rows, -1, weights.shape[1]).sum(0).div_(rows).sqrt_().sum(0)
    return per_head * torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
