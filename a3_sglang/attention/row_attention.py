"""Attention of arbitrary rows over paged KV: each row sees its own request's positions up to its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from a3_sglang.attention.relevance import attention_weights, hidden_columns, key_columns, query_rows


@dataclass(frozen=True, slots=True)
class RequestRows:
    """Rows of one request within a batch of rows.

    Attributes:
        begin, end: the request's rows in the batch.
        slots: int64 (n,), KV slots of the whole prompt by ascending position; those no row sees may be any.
        visible: int64 (end - begin,), ascending: how many of ``slots`` each row sees.
        exact: no KV of the request is approximate, so rows should round as in a full prefill where kernels allow.
    """

    begin: int
    end: int
    slots: torch.Tensor
    visible: torch.Tensor
    exact: bool


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Attention of a pass's rows at one layer: ``(query, keys, values, scaling) -> out``.

``query`` and ``out`` are (rows, heads, head_dim) of one dtype, ``keys`` and ``values`` (slots, kv_heads, head_dim) with
the rows' own already written; ``scaling`` multiplies the logits.
"""


class RowAttention(ABC):
    """How rows attend; one implementation for each kind of device."""

    @abstractmethod
    def plan(self, groups: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> Attention:
        """Prepare a pass, once for all layers.

        Args:
            groups: who owns which rows; together they cover all rows in order.
            heads: query heads of a layer.
            kv_heads: KV heads of a layer.
            dtype: of query, keys and values.
        """


class TritonRowAttention(RowAttention):
    """One launch a layer for the rows of all requests, on CUDA devices."""

    def plan(self, groups: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> Attention:
        # Imported here: a machine without a GPU need not have Triton.
        from a3_sglang.kernels.row_attention import make_tiles, row_attention

        counts, slots = [g.end - g.begin for g in groups], [g.slots for g in groups]
        tiles = make_tiles(counts, slots, [g.visible for g in groups], heads // kv_heads)
        return lambda query, keys, values, scaling: row_attention(query, keys, values, tiles, scaling)


class TorchRowAttention(RowAttention):
    """A block of rows at a time, each over little more context than it can see."""

    def plan(self, groups: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> Attention:
        plans = [(_exact if group.exact else _scattered)(group, heads, kv_heads, dtype) for group in groups]

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
            out = torch.empty_like(query)
            for group, one in zip(groups, plans, strict=True):
                k, v = (pool.index_select(0, group.slots) for pool in (keys, values))
                # Slots that nothing wrote yet hold what a former request left there, and a mask does not stop NaN.
                seen = int(group.visible[-1])
                k[seen:], v[seen:] = 0, 0
                out[group.begin : group.end] = one(query[group.begin : group.end], k, v, scaling)
            return out

        return attend


_BLOCK = 256
"""Rows times heads of a group that are taken at once: more waste context, fewer make slow matrix products."""


def _scattered(group: RequestRows, heads: int, kv_heads: int, dtype: torch.dtype) -> Attention:
    """Logits and softmax in fp32, the heads of a group as further rows."""
    visible, rows, shared = group.visible, len(group.visible), heads // kv_heads
    count = -(-rows * shared // _BLOCK)
    cuts = [rows * i // count for i in range(count + 1)]
    hidden = [hidden_columns(visible[begin:end]) for begin, end in pairwise(cuts)]
    most = shared * max((end - begin) * int(visible[end - 1]) for begin, end in pairwise(cuts))
    logits, weights = (torch.empty(most, dtype=kind, device=visible.device) for kind in (torch.float32, dtype))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        out = torch.empty_like(query)
        heads_out = out.view(rows, kv_heads, shared, -1)
        query, keys, values = query_rows(query, kv_heads), key_columns(keys), values.movedim(0, 1).contiguous()
        for (begin, end), unseen in zip(pairwise(cuts), hidden, strict=True):
            part, size = slice(begin * shared, end * shared), (end - begin) * shared * unseen.end
            for head in range(kv_heads):
                columns = keys[head, :, : unseen.end]
                exact = attention_weights(query[head, part], columns, unseen, scaling, dtype, logits[:size])
                rounded = weights[:size].view_as(exact).copy_(exact)
                mixed = torch.mm(rounded, values[head, : unseen.end])
                heads_out[begin:end, head] = mixed.view(end - begin, shared, -1)
        return out

    return attend


_EXACT_BLOCK = 256
_CONTEXT_UNIT = 512
_ROW_UNIT = 32


def _exact(group: RequestRows, heads: int, kv_heads: int, dtype: torch.dtype) -> Attention:
    """PyTorch's fused attention, bit-equal to the same rows of one causal attention over the whole prompt.

    PyTorch's CPU kernel adds up the context in blocks of 512 and its matrix products round by their shape. So the
    context is cut only there (or at the prompt's own end), rows are padded, and the few rows of the prompt's last
    block stay among themselves (all of them are here, or none).
    """
    visible, prompt, rows = group.visible, len(group.slots), len(group.visible)
    last = prompt % _query_block(prompt)
    whole = int((visible <= prompt - last).sum()) if last < _ROW_UNIT else rows
    cuts = [*range(0, whole, _EXACT_BLOCK), *range(whole, rows, _EXACT_BLOCK), rows]

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        out = torch.empty_like(query)
        keys, values = keys.movedim(0, 1).unsqueeze(0), values.movedim(0, 1).unsqueeze(0)
        for begin, end in pairwise(cuts):
            padding = -(end - begin) % _ROW_UNIT if begin < whole else 0
            part, seen = (
                torch.cat([x[begin:end], x[end - 1 : end].expand(padding, *x.shape[1:])]) for x in (query, visible)
            )
            reach = int(seen[-1])
            reach = min(reach + -reach % _CONTEXT_UNIT, prompt)
            mixed = scaled_dot_product_attention(
                part.movedim(0, 1).unsqueeze(0),
                keys[:, :, :reach],
                values[:, :, :reach],
                attn_mask=torch.arange(reach, device=seen.device) < seen[:, None],
                scale=scaling,
                enable_gqa=heads != kv_heads,
            )
            out[begin:end] = mixed[0].movedim(0, 1)[: end - begin]
        return out

    return attend


def _query_block(length: int) -> int:
    """Rows that PyTorch's CPU kernel takes at once when as many rows as this attend causally."""
    return 256 if length >= 768 else 64 if length >= 192 else 32
