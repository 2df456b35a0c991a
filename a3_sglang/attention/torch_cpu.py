"""Attention by PyTorch's own operations, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from a3_sglang.attention.base import KV, Attention, ProbeAttention, ProbeFn, ProbeRows, RequestRows, RowAttention
from a3_sglang.attention.relevance import (
    Hidden,
    attention_weights,
    hidden_columns,
    key_columns,
    query_rows,
    relevance,
)


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


class TorchProbeAttention(ProbeAttention):
    """One question after the other in plain matrix products."""

    def plan(self, questions: Sequence[ProbeRows], heads: int, kv_heads: int) -> ProbeFn:
        alone = [_Alone(question) for question in questions]

        def ask(query: torch.Tensor, own: KV, pools: KV, scaling: float, scores: torch.Tensor | None) -> torch.Tensor:
            out, at = torch.empty_like(query), 0
            for one in alone:
                rows = slice(one.question.begin, one.question.end)
                context = slice(at, at + len(one.question.known))
                mine = None if scores is None else scores[context]
                keys, values = own
                out[rows] = one.ask(query[rows], (keys[rows], values[rows]), pools, scaling, mine)
                at = context.stop
            return out

        return ask


@dataclass(slots=True)
class _Alone:
    question: ProbeRows
    _hidden: Hidden = field(init=False)
    _room: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known, rows = self.question.known, self.question.end - self.question.begin
        self._hidden = hidden_columns(torch.arange(1, rows + 1, device=known.device) + len(known))

    def ask(self, query: torch.Tensor, own: KV, pools: KV, scaling: float, scores: torch.Tensor | None) -> torch.Tensor:
        rows, heads, dim = query.shape
        known, kv_heads = self.question.known, own[0].shape[1]
        count, total = len(known), len(known) + rows
        keys, values = (self._take(name, total, x[:0]) for name, x in zip("kv", own, strict=True))
        for context, pool, fresh in zip((keys, values), pools, own, strict=True):
            torch.index_select(pool, 0, known, out=context[:count])
            context[count:] = fresh
        size = heads // kv_heads * rows * total
        logits = self._take("logits", size, torch.empty(0, device=query.device))
        rounded = self._take("weights", size, query.new_empty(0))
        out = torch.empty_like(query)
        heads_out = out.view(rows, kv_heads, -1, dim)
        asked, columns, values = query_rows(query, kv_heads), key_columns(keys), values.movedim(0, 1).contiguous()
        for head in range(kv_heads):
            weights = attention_weights(asked[head], columns[head], self._hidden, scaling, query.dtype, logits)
            mixed = torch.mm(rounded.view_as(weights).copy_(weights), values[head])
            heads_out[:, head] = mixed.view(rows, -1, dim)
            if scores is not None:
                scores += relevance(weights, rows, values[head])[:count]
        return out

    def _take(self, name: str, count: int, like: torch.Tensor) -> torch.Tensor:
        """Room for ``count`` rows like those of ``like``; the same for all layers."""
        if name not in self._room:
            self._room[name] = like.new_empty(count, *like.shape[1:])
        return self._room[name]
