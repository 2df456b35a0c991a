"""How much a question takes from each position of its context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


def attention_weights(
    query: torch.Tensor, keys: torch.Tensor, hidden: Hidden, scaling: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention of rows over their context; sums and softmax in float32.

    Args:
        query: (rows, heads, head_dim).
        keys: float32 (kv_heads, head_dim, n), values that the dtype of ``query`` holds; heads of a group are
            neighbours. See :func:`key_columns`.
        hidden: what rows do not see; ``hidden.end`` is n.
        scaling: factor of the logits.
        out: float32, contiguous, heads * rows * n elements; takes the result.

    Returns:
        float32 (kv_heads, group * rows, n); rows of one head of a group stand together.
    """
    rows, heads, dim = query.shape
    kv_heads, _, n = keys.shape
    group = heads // kv_heads
    q = query.view(rows, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * rows, dim).float()
    if out is None:
        out = torch.empty(heads * rows * n, device=query.device)
    logits = out.view(kv_heads, group * rows, n)
    with _products_of(query.dtype):
        torch.baddbmm(logits, q, keys, beta=0, alpha=scaling, out=logits)
    logits.view(kv_heads, group, rows, n)[..., hidden.begin :].masked_fill_(hidden.mask, float("-inf"))
    return torch.softmax(logits, dim=-1, out=logits)


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Where float32 factors hold bf16 values, a CPU's bf16 units multiply them exactly and add up in float32."""
    matmul = torch.backends.mkldnn.matmul
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
        weights: what :func:`attention_weights` returned for the question's rows, (kv_heads, group * rows, n).
        rows: how many rows these are.
        values: (n, kv_heads, head_dim).

    Returns:
        float32 (n,), summed over heads.
    """
    kv_heads, _, n = weights.shape
    # Nine times as fast on a CPU as a norm over the middle dimension.
    per_head = weights.view(kv_heads, -1, rows, n).square().sum(2).div_(rows).sqrt_().sum(1)
    sizes = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    return (per_head * sizes.T).sum(0)
