"""Attention by PyTorch's own operations, for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from a3_sglang.attention.base import KV, ProbeAttention, ProbeFn, ProbeRows, RequestRows, RowAttention, RowAttentionFn
from a3_sglang.attention.relevance import (
    CausalMask,
    attention_weights,
    causal_mask,
    key_columns,
    query_rows,
    relevance,
)

LANES_PER_BLOCK = 256
"""Rows times heads per KV head that attend at once: more waste context, fewer make matrix products slow."""
EXACT_ROWS_PER_BLOCK = 256
SDPA_CONTEXT_BLOCK = 512
"""PyTorch's fused CPU attention sums the context in blocks of this size."""
SDPA_ROW_UNIT = 32
"""The fused attention gets multiples of this many rows, so that they round alike."""


class TorchRowAttention(RowAttention):
    """One block of rows at a time, each over little more context than it attends to."""

    def plan(self, requests: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
        plans = [(_exact if request.exact else _approximate)(request, heads, kv_heads, dtype) for request in requests]

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
            out = torch.empty_like(query)
            for request, run in zip(requests, plans, strict=True):
                k, v = (pool.index_select(0, request.slots) for pool in (keys, values))
                # Slots that are not written yet hold an earlier request's KV, and NaN survives a mask.
                longest = int(request.kv_lens[-1])
                k[longest:], v[longest:] = 0, 0
                out[request.begin : request.end] = run(query[request.begin : request.end], k, v, scaling)
            return out

        return attend


def _approximate(request: RequestRows, heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
    """Logits and softmax in float32, the heads of a GQA group as further rows."""
    kv_lens, rows, group = request.kv_lens, len(request.kv_lens), heads // kv_heads
    count = -(-rows * group // LANES_PER_BLOCK)
    cuts = [rows * i // count for i in range(count + 1)]
    masks = [causal_mask(kv_lens[begin:end]) for begin, end in pairwise(cuts)]
    largest = group * max((end - begin) * int(kv_lens[end - 1]) for begin, end in pairwise(cuts))
    logits, weights = (torch.empty(largest, dtype=kind, device=kv_lens.device) for kind in (torch.float32, dtype))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        out = torch.empty_like(query)
        out_by_kv_head = out.view(rows, kv_heads, group, -1)
        query, keys, values = query_rows(query, kv_heads), key_columns(keys), values.movedim(0, 1).contiguous()
        for (begin, end), mask in zip(pairwise(cuts), masks, strict=True):
            lanes, size = slice(begin * group, end * group), (end - begin) * group * mask.end
            for head in range(kv_heads):
                columns = keys[head, :, : mask.end]
                exact = attention_weights(query[head, lanes], columns, mask, scaling, dtype, logits[:size])
                rounded = weights[:size].view_as(exact).copy_(exact)
                block_out = torch.mm(rounded, values[head, : mask.end])
                out_by_kv_head[begin:end, head] = block_out.view(end - begin, group, -1)
        return out

    return attend


def _exact(request: RequestRows, heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
    """PyTorch's fused attention, bit-equal to the same rows of one causal attention over the whole prompt.

    PyTorch's CPU kernel sums the context in blocks of 512, and its matrix products round by their shape. So the context
    is cut only at these blocks or at the prompt's own end, rows are padded, and the few rows of the prompt's last block
    attend separately (all of them are in the pass, or none).
    """
    kv_lens, prompt, rows = request.kv_lens, len(request.slots), len(request.kv_lens)
    last = prompt % _query_block(prompt)
    whole = int((kv_lens <= prompt - last).sum()) if last < SDPA_ROW_UNIT else rows
    cuts = [*range(0, whole, EXACT_ROWS_PER_BLOCK), *range(whole, rows, EXACT_ROWS_PER_BLOCK), rows]

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        out = torch.empty_like(query)
        keys, values = keys.movedim(0, 1).unsqueeze(0), values.movedim(0, 1).unsqueeze(0)
        for begin, end in pairwise(cuts):
            padding = -(end - begin) % SDPA_ROW_UNIT if begin < whole else 0
            block, block_kv_lens = (
                torch.cat([x[begin:end], x[end - 1 : end].expand(padding, *x.shape[1:])]) for x in (query, kv_lens)
            )
            context = int(block_kv_lens[-1])
            context = min(context + -context % SDPA_CONTEXT_BLOCK, prompt)
            block_out = scaled_dot_product_attention(
                block.movedim(0, 1).unsqueeze(0),
                keys[:, :, :context],
                values[:, :, :context],
                attn_mask=torch.arange(context, device=kv_lens.device) < block_kv_lens[:, None],
                scale=scaling,
                enable_gqa=heads != kv_heads,
            )
            out[begin:end] = block_out[0].movedim(0, 1)[: end - begin]
        return out

    return attend


def _query_block(length: int) -> int:
    """Rows per block in PyTorch's CPU kernel if ``length`` rows attend causally."""
    return 256 if length >= 768 else 64 if length >= 192 else 32


class TorchProbeAttention(ProbeAttention):
    """One request after the other, in plain matrix products."""

    def plan(self, requests: Sequence[ProbeRows], heads: int, kv_heads: int, mean: bool = False) -> ProbeFn:
        probes = [_RequestProbe(request, mean) for request in requests]

        def attend(
            query: torch.Tensor, own: KV, pools: KV, scaling: float, scores: torch.Tensor | None
        ) -> torch.Tensor:
            out, begin = torch.empty_like(query), 0
            keys, values = own
            for probe in probes:
                rows = slice(probe.request.begin, probe.request.end)
                context = slice(begin, begin + len(probe.request.context_slots))
                request_scores = None if scores is None else scores[context]
                out[rows] = probe.attend(query[rows], (keys[rows], values[rows]), pools, scaling, request_scores)
                begin = context.stop
            return out

        return attend


@dataclass(slots=True)
class _RequestProbe:
    request: ProbeRows
    mean: bool
    _mask: CausalMask = field(init=False)
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots, rows = self.request.context_slots, self.request.end - self.request.begin
        self._mask = causal_mask(torch.arange(1, rows + 1, device=slots.device) + len(slots))

    def attend(
        self, query: torch.Tensor, own: KV, pools: KV, scaling: float, scores: torch.Tensor | None
    ) -> torch.Tensor:
        rows, heads, dim = query.shape
        slots, kv_heads = self.request.context_slots, own[0].shape[1]
        context, total = len(slots), len(slots) + rows
        # The request's context, followed by its own rows.
        keys, values = (self._buffer(name, total, x[:0]) for name, x in zip("kv", own, strict=True))
        for gathered, pool, fresh in zip((keys, values), pools, own, strict=True):
            torch.index_select(pool, 0, slots, out=gathered[:context])
            gathered[context:] = fresh
        size = heads // kv_heads * rows * total
        logits = self._buffer("logits", size, torch.empty(0, device=query.device))
        rounded = self._buffer("weights", size, query.new_empty(0))
        out = torch.empty_like(query)
        out_by_kv_head = out.view(rows, kv_heads, -1, dim)
        queries, columns, values = query_rows(query, kv_heads), key_columns(keys), values.movedim(0, 1).contiguous()
        for head in range(kv_heads):
            weights = attention_weights(queries[head], columns[head], self._mask, scaling, query.dtype, logits)
            head_out = torch.mm(rounded.view_as(weights).copy_(weights), values[head])
            out_by_kv_head[:, head] = head_out.view(rows, -1, dim)
            if scores is not None:
                scores += relevance(weights, rows, values[head], self.mean)[:context]
        return out

    def _buffer(self, name: str, count: int, like: torch.Tensor) -> torch.Tensor:
        """Memory for ``count`` rows shaped like those of ``like``; reused by all layers."""
        if name not in self._buffers:
            self._buffers[name] = like.new_empty(count, *like.shape[1:])
        return self._buffers[name]
