"""Attention of questions over known context and themselves, and what they take from each position of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from a3_sglang.attention.relevance import (
    Hidden,
    attention_weights,
    hidden_columns,
    key_columns,
    query_rows,
    relevance,
)


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """Rows of one request within a batch of rows.

    Attributes:
        begin, end: the request's rows in the batch.
        known: int64 (context,), slots of the positions that all its rows see.
    """

    begin: int
    end: int
    known: torch.Tensor


KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""

ProbeFn = Callable[[torch.Tensor, KV, KV, float, torch.Tensor | None], torch.Tensor]
"""Attention of all rows at one layer: ``(query, own, pools, scaling, scores) -> out``.

``query`` and ``out`` are (rows, heads, head_dim); ``own`` the rows' keys and values, each (rows, kv_heads, head_dim),
which get no slots; ``pools`` those of the layer, each (slots, kv_heads, head_dim). A row sees its request's known
context and its request's rows up to itself. To ``scores``, float32 (sum of contexts,), is added what each known
position gives to its question (:func:`a3_sglang.attention.relevance.relevance`); None: that is not wanted.
"""


class ProbeAttention(ABC):
    """How questions attend; one implementation for each kind of device."""

    @abstractmethod
    def plan(self, questions: Sequence[ProbeRows], heads: int, kv_heads: int) -> ProbeFn:
        """Prepare a pass, once for all layers.

        Args:
            questions: who owns which rows; together they cover all rows in order.
            heads: query heads of a layer.
            kv_heads: KV heads of a layer.
        """


class TritonProbeAttention(ProbeAttention):
    """A few launches a layer for the questions of all requests, on CUDA devices."""

    def plan(self, questions: Sequence[ProbeRows], heads: int, kv_heads: int) -> ProbeFn:
        # Imported here: a machine without a GPU need not have Triton.
        from a3_sglang.kernels.probe_attention import make_layout, probe_attention

        counts, known = [q.end - q.begin for q in questions], [q.known for q in questions]
        layout = make_layout(counts, known, heads, kv_heads)
        return lambda query, own, pools, scaling, scores: probe_attention(query, own, *pools, layout, scaling, scores)


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
