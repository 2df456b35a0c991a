"""Attention weights on a CPU, and how relevant each context position is to the probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from a3_sglang.attention.base import AttentionSpec


def key_columns(keys: torch.Tensor) -> torch.Tensor:
    """Keys in the layout of :func:`attention_weights`, with which its matrix product is fastest.

    Args:
        keys: (n, kv_heads, head_dim).

    Returns:
        float32 (kv_heads, head_dim, n), contiguous.
    """
    return keys.movedim(0, 1).contiguous().transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class Mask:
    """Which of the columns ``[first, end)`` each row does not attend to; all rows attend to those before ``begin``.

    Attributes:
        first, begin, end: columns.
        hidden: bool (rows, end - begin).
    """

    first: int
    begin: int
    end: int
    hidden: torch.Tensor


def causal_mask(kv_lens: torch.Tensor, window: int | None = None) -> Mask:
    """The mask of rows whose own column is the last of their first ``kv_lens``.

    Args:
        kv_lens: int64 (rows,), at least 1.
        window: rows attend to this many columns before their own; None: to all of them.
    """
    shortest, longest = int(kv_lens.min()), int(kv_lens.max())
    if window is None or window >= longest - 1:
        return Mask(0, shortest, longest, torch.arange(shortest, longest, device=kv_lens.device) >= kv_lens[:, None])
    first = max(0, shortest - 1 - window)
    columns = torch.arange(first, longest, device=kv_lens.device)
    return Mask(first, first, longest, (columns >= kv_lens[:, None]) | (columns < kv_lens[:, None] - 1 - window))


def probe_mask(context_pos: torch.Tensor, row_pos: torch.Tensor, window: int | None) -> Mask:
    """The mask of a probe's rows; the columns are the context, followed by the rows themselves.

    Args:
        context_pos: int64 (context,), ascending.
        row_pos: int64 (rows,), ascending, after the context.
        window: rows attend to this many positions before their own; None: to all of them.
    """
    context, rows = len(context_pos), len(row_pos)
    if window is None:
        return causal_mask(torch.arange(1, rows + 1, device=row_pos.device) + context)
    columns = torch.cat([context_pos, row_pos])
    first = int((columns < row_pos[0] - window).sum())
    columns = columns[first:]
    hidden = (columns > row_pos[:, None]) | (columns < row_pos[:, None] - window)
    return Mask(first, first, context + rows, hidden)


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
    mask: Mask,
    spec: AttentionSpec,
    dtype: torch.dtype,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of rows over their context, for one KV head; sums and softmax in float32.

    It takes one head at a time, since its logits fit into the CPU's cache and a batched product takes longer.

    Args:
        query: float32 (rows * group, head_dim), see :func:`query_rows`.
        keys: float32 (head_dim, n), see :func:`key_columns`.
        mask: of the rows; the n columns are those from ``mask.first`` to ``mask.end``.
        spec: how the layer attends.
        dtype: that all values of queries and keys can be represented in.
        sinks: (group,), those of ``spec.sinks`` that belong to these heads.
        out: float32, contiguous, rows * group * n elements; receives the result.

    Returns:
        float32 (rows * group, n).
    """
    rows, n = len(query), keys.shape[1]
    logits = torch.empty(rows, n, device=query.device) if out is None else out.view(rows, n)
    with _matmul_precision(dtype):
        torch.addmm(logits, query, keys, beta=0, alpha=spec.scaling, out=logits)
    if spec.logit_cap:
        logits.div_(spec.logit_cap).tanh_().mul_(spec.logit_cap)
    by_row = logits.view(len(mask.hidden), -1, n)
    by_row[..., mask.begin - mask.first :].masked_fill_(mask.hidden[:, None], float("-inf"))
    if sinks is None:
        return torch.softmax(logits, dim=-1, out=logits)
    # A sink adds exp(sink) to the denominator, which is exp(total).
    total = torch.logsumexp(by_row, dim=-1, keepdim=True)
    torch.softmax(logits, dim=-1, out=logits)
    by_row.mul_(torch.sigmoid(total - sinks.float()[:, None]))
    return logits


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
