"""Attention of arbitrary rows over paged KV: each row sees its own request's positions up to its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of one request within a batch of rows.

    Attributes:
        begin, end: the request's rows in the batch.
        slots: int64 (n,), KV slots of the whole prompt by ascending position; those no row sees may be any.
        visible: int64 (end - begin,), ascending: how many of ``slots`` each row sees.
    """

    begin: int
    end: int
    slots: torch.Tensor
    visible: torch.Tensor


class RowAttention(ABC):
    """How rows attend; one implementation for each kind of device."""

    @abstractmethod
    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        groups: Sequence[RowGroup],
        scaling: float,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: (rows, heads, head_dim).
            keys: (slots, kv_heads, head_dim); the rows' own are already written.
            values: like ``keys``.
            groups: who owns which rows; together they cover all rows in order.
            scaling: factor of the logits.

        Returns:
            (rows, heads, head_dim), dtype of ``query``.
        """


class TorchRowAttention(RowAttention):
    """PyTorch's fused attention, a block of rows at a time, each over little more context than it can see."""

    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        groups: Sequence[RowGroup],
        scaling: float,
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for group in groups:
            k, v = (pool.index_select(0, group.slots) for pool in (keys, values))
            # Slots that nothing wrote yet hold what a former request left there, and a mask does not stop NaN.
            seen = int(group.visible[-1])
            k[seen:], v[seen:] = 0, 0
            k, v = k.movedim(0, 1), v.movedim(0, 1)
            attend(query[group.begin : group.end], k, v, group.visible, scaling, out[group.begin : group.end])
        return out


_CONTEXT_UNIT = 512
_ROW_UNIT = 32


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
) -> None:
    """Attention of one request's rows over its gathered context.

    PyTorch's CPU kernel adds up the context in blocks of 512 and its matrix products round by their shape. Cutting
    the context only there (or at the prompt's own end), padding the rows, and leaving the few rows of the prompt's
    last block among themselves makes every row bit-equal to the same row of one causal attention over the whole
    prompt.

    Args:
        query: (rows, heads, head_dim).
        keys: (kv_heads, n, head_dim); n is the length of the prompt.
        values: like ``keys``.
        visible: int64 (rows,), ascending: how many of the keys each row sees.
        scaling: factor of the logits.
        out: like ``query``; written.
    """
    place = torch.arange(keys.shape[1], device=keys.device)
    heads, kv_heads = query.shape[1], keys.shape[0]
    # Scattered rows: few at a time waste less context, and the heads of a group make up for it as further rows.
    sparse = 2 * len(query) < int(visible[-1] - visible[0])
    size, fold = (64, heads // kv_heads) if sparse else (256, 1)
    last = len(place) % _query_block(len(place))
    whole = int((visible <= len(place) - last).sum()) if last < _ROW_UNIT else len(query)
    cuts = [*range(0, whole, size), *range(whole, len(query), size)]
    for at, end in zip(cuts, [*cuts[1:], len(query)], strict=True):
        seen, q = visible[at:end], query[at:end]
        rows, reach = len(q), int(seen[-1])
        reach = min(reach + -reach % _CONTEXT_UNIT, len(place))
        if (padding := -rows % _ROW_UNIT) and at < whole:
            q, seen = torch.cat([q, q[-1:].expand(padding, -1, -1)]), torch.cat([seen, seen[-1:].expand(padding)])
        padded = len(q)
        q = q.view(padded, heads // fold, fold, -1).permute(1, 2, 0, 3).reshape(heads // fold, fold * padded, -1)
        result = scaled_dot_product_attention(
            q.unsqueeze(0),
            keys[:, :reach].unsqueeze(0),
            values[:, :reach].unsqueeze(0),
            attn_mask=(place[:reach] < seen[:, None]).repeat(fold, 1),
            scale=scaling,
            enable_gqa=len(q) != kv_heads,
        )
        result = result.view(heads // fold, fold, padded, -1).permute(2, 0, 1, 3).reshape(padded, heads, -1)
        out[at:end] = result[:rows]


def _query_block(length: int) -> int:
    """Rows that PyTorch's CPU kernel takes at once when as many rows as this attend causally."""
    return 256 if length >= 768 else 64 if length >= 192 else 32
