"""How much a question attends to each position of its context."""

from __future__ import annotations

import torch


def relevance(
    query: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of question rows over their context, and its sum over heads and rows.

    Args:
        query: (rows, heads, head_dim).
        keys: (n, kv_heads, head_dim); heads of a group are neighbours.
        visible: int64 (rows,): how many of the keys each row sees, from the first on.
        scaling: factor of the logits.

    Returns:
        The probabilities, float32 (kv_heads, rows * group, n), rows of one head of a group together, and
        their mean over rows, summed over heads, float32 (n,). Softmax in float32.
    """
    rows, heads, dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    q = query.view(rows, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * rows, dim)
    logits = torch.matmul(q.float(), keys.permute(1, 2, 0).float()) * scaling
    hidden = torch.arange(keys.shape[0], device=keys.device) >= visible[:, None]
    logits = logits.view(kv_heads, group, rows, -1).masked_fill(hidden, float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)
    return probabilities.view(kv_heads, group * rows, -1), probabilities.sum((0, 1, 2)) / rows
