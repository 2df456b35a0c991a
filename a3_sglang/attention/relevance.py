"""How much a question takes from each position of its context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


def key_columns(keys: torch.Tensor) -> torch.Tensor:
    """Keys as :func:`attention_weights` wants them.

    Args:
        keys: (n, kv_heads, head_dim).

    Returns:
        float32 (kv_heads, head_dim, n), contiguous, which the matrix product is fastest with.
    """
    return keys.movedim(0, 1).contiguous().transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class Hidden:
    """Which of the first ``end`` columns each row does not see; what stands before ``begin`` all rows see.

    Attributes:
        begin, end: columns.
        mask: bool (rows, end - begin).
    """

    begin: int
    end: int
    mask: torch.Tensor


def hidden_columns(visible: torch.Tensor) -> Hidden:
    """What rows do not see of the columns that any of them sees.

    Args:
        visible: int64 (rows,): how many columns each row sees, from the first on; at least 1.
    """
    begin, end = int(visible.min()), int(visible.max())
    return Hidden(begin, end, torch.arange(begin, end, device=visible.device) >= visible[:, None])


def query_rows(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Queries as :func:`attention_weights` wants them: the heads that share a KV head as further rows.

    Args:
        query: (rows, heads, head_dim).
        kv_heads: KV heads.

    Returns:
        float32 (kv_heads, rows * group, head_dim); the heads of a row are neighbours.
    """
    rows, heads, dim = query.shape
    return query.view(rows, kv_heads, heads // kv_heads, dim).movedim(1, 0).flatten(1, 2).float()


def attention_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    hidden: Hidden,
    scaling: float,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of rows over their context, for one KV head; sums and softmax in float32.

    One head at a time, since its logits stay in the cache and a CPU's batched product takes longer.

    Args:
        query: float32 (rows * group, head_dim), see :func:`query_rows`.
        keys: float32 (head_dim, n), see :func:`key_columns`.
        hidden: what rows do not see; ``hidden.end`` is n.
        scaling: factor of the logits.
        dtype: holds the values of queries and keys.
        out: float32, contiguous, rows * group * n elements; takes the result.

    Returns:
        float32 (rows * group, n).
    """
    rows, n = len(query), keys.shape[1]
    logits = torch.empty(rows, n, device=query.device) if out is None else out.view(rows, n)
    with _products_of(dtype):
        torch.addmm(logits, query, keys, beta=0, alpha=scaling, out=logits)
    logits.view(len(hidden.mask), -1, n)[..., hidden.begin :].masked_fill_(hidden.mask[:, None], float("-inf"))
    return torch.softmax(logits, dim=-1, out=logits)


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Float32 products in a CPU's bf16 units if ``dtype`` is bf16: factors are rounded to it, sums are float32."""
    backend: Any = torch.backends.mkldnn  # Its stubs lack the attribute.
    matmul = backend.matmul
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def relevance(weights: torch.Tensor, rows: int, values: torch.Tensor) -> torch.Tensor:
    """What each position gives to the question: attention, root mean square over its rows, times size of the value.

    The mean square sides with positions that few rows of the question look at hard. A position whose value is small
    adds little to the output however much attention it gets (sinks are such).

    Args:
        weights: what :func:`attention_weights` returned for the question's rows, (rows * group, n); squared in place.
        rows: how many rows these are.
        values: (n, head_dim).

    Returns:
        float32 (n,), summed over the heads of the group.
    """
    # Nine times as fast on a CPU as a norm over the first dimension.
    per_head = weights.square_().view(rows, -1, weights.shape[1]).sum(0).div_(rows).sqrt_().sum(0)
    return per_head * torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
