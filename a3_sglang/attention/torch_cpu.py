"""Attention by PyTorch's own operations, for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from a3_sglang.attention.base import (
    KV,
    AttentionSpec,
    ProbeAttention,
    ProbeFn,
    ProbeRows,
    RequestRows,
    RowAttention,
    RowAttentionFn,
)
from a3_sglang.attention.relevance import (
    Mask,
    attention_weights,
    causal_mask,
    key_columns,
    probe_mask,
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
        @cache
        def planned(number: int, fused: bool) -> RowAttentionFn:
            request = requests[number]
            return _exact(request, heads, kv_heads) if fused else _approximate(request, heads, kv_heads, dtype)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
            out = torch.empty_like(query)
            # PyTorch's fused attention has neither caps nor sinks.
            fused = not spec.logit_cap and spec.sinks is None
            for number, request in enumerate(requests):
                run = planned(number, fused and request.exact)
                k, v = (pool.index_select(0, request.slots) for pool in (keys, values))
                # Slots that are not written yet hold an earlier request's KV, and NaN survives a mask.
                longest = int(request.kv_lens[-1])
                k[longest:], v[longest:] = 0, 0
                out[request.begin : request.end] = run(query[request.begin : request.end], k, v, spec)
            return out

        return attend


def _approximate(request: RequestRows, heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
    """Logits and softmax in float32, the heads of a GQA group as further rows."""
    kv_lens, rows, group = request.kv_lens, len(request.kv_lens), heads // kv_heads
    count = -(-rows * group // LANES_PER_BLOCK)
    cuts = [rows * i // count for i in range(count + 1)]
    blocks = list(pairwise(cuts))
    largest = group * max((end - begin) * int(kv_lens[end - 1]) for begin, end in blocks)
    logits, weights = (torch.empty(largest, dtype=kind, device=kv_lens.device) for kind in (torch.float32, dtype))

    @cache
    def masks(window: int | None) -> list[Mask]:
        return [causal_mask(kv_lens[begin:end], window) for begin, end in blocks]

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        out = torch.empty_like(query)
        out_by_kv_head = out.view(rows, kv_heads, group, -1)
        sinks = spec.sinks_by_kv_head(kv_heads)
        query, keys, values = query_rows(query, kv_heads), key_columns(keys), values.movedim(0, 1).contiguous()
        for (begin, end), mask in zip(blocks, masks(spec.window), strict=True):
            lanes, seen = slice(begin * group, end * group), slice(mask.first, mask.end)
            size = (end - begin) * group * (mask.end - mask.first)
            for head in range(kv_heads):
                exact = attention_weights(
                    query[head, lanes], keys[head, :, seen], mask, spec, dtype, sinks[head], logits[:size]
                )
                rounded = weights[:size].view_as(exact).copy_(exact)
                block_out = torch.mm(rounded, values[head, seen])
                out_by_kv_head[begin:end, head] = block_out.view(end - begin, group, -1)
        return out

    return attend


def _exact(request: RequestRows, heads: int, kv_heads: int) -> RowAttentionFn:
    """PyTorch's fused attention, bit-equal to the same rows of one causal attention over the whole prompt.

    PyTorch's CPU kernel sums the context in blocks of 512, and its matrix products round by their shape. So the context
    is cut only at these blocks or at the prompt's own end, rows are padded, and the few rows of the prompt's last block
    attend separately (all of them are in the pass, or none).
    """
    kv_lens, prompt, rows = request.kv_lens, len(request.slots), len(request.kv_lens)
    last = prompt % _query_block(prompt)
    whole = int((kv_lens <= prompt - last).sum()) if last < SDPA_ROW_UNIT else rows
    cuts = [*range(0, whole, EXACT_ROWS_PER_BLOCK), *range(whole, rows, EXACT_ROWS_PER_BLOCK), rows]

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        out = torch.empty_like(query)
        keys, values = keys.movedim(0, 1).unsqueeze(0), values.movedim(0, 1).unsqueeze(0)
        for begin, end in pairwise(cuts):
            padding = -(end - begin) % SDPA_ROW_UNIT if begin < whole else 0
            block, block_kv_lens = (
                torch.cat([x[begin:end], x[end - 1 : end].expand(padding, *x.shape[1:])]) for x in (query, kv_lens)
            )
            context = int(block_kv_lens[-1])
            context = min(context + -context % SDPA_CONTEXT_BLOCK, prompt)
            columns = torch.arange(context, device=kv_lens.device)
            seen = columns < block_kv_lens[:, None]
            if spec.window is not None:
                seen &= columns >= block_kv_lens[:, None] - 1 - spec.window
            block_out = scaled_dot_product_attention(
                block.movedim(0, 1).unsqueeze(0),
                keys[:, :, :context],
                values[:, :, :context],
                attn_mask=seen,
                scale=spec.scaling,
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
            query: torch.Tensor, own: KV, pools: KV, spec: AttentionSpec, scores: torch.Tensor | None
        ) -> torch.Tensor:
            out, begin = torch.empty_like(query), 0
            keys, values = own
            for probe in probes:
                rows = slice(probe.request.begin, probe.request.end)
                context = slice(begin, begin + len(probe.request.context_slots))
                request_scores = None if scores is None else scores[context]
                out[rows] = probe.attend(query[rows], (keys[rows], values[rows]), pools, spec, request_scores)
                begin = context.stop
            return out

        return attend


@dataclass(slots=True)
class _RequestProbe:
    request: ProbeRows
    mean: bool
    _masks: dict[int | None, Mask] = field(default_factory=dict)
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def attend(
        self, query: torch.Tensor, own: KV, pools: KV, spec: AttentionSpec, scores: torch.Tensor | None
    ) -> torch.Tensor:
        rows, heads, dim = query.shape
        kv_heads, mask = own[0].shape[1], self._mask(spec.window)
        slots, context = self.request.context_slots[mask.first :], len(self.request.context_slots)
        known, total = len(slots), mask.end - mask.first
        # The part of the request's context that is seen, followed by its own rows.
        keys, values = (self._buffer(name, context + rows, x[:0])[:total] for name, x in zip("kv", own, strict=True))
        for gathered, pool, fresh in zip((keys, values), pools, own, strict=True):
            torch.index_select(pool, 0, slots, out=gathered[:known])
            gathered[known:] = fresh
        size = heads // kv_heads * rows
        logits = self._buffer("logits", size * (context + rows), torch.empty(0, device=query.device))[: size * total]
        rounded = self._buffer("weights", size * (context + rows), query.new_empty(0))[: size * total]
        out = torch.empty_like(query)
        out_by_kv_head = out.view(rows, kv_heads, -1, dim)
        sinks = spec.sinks_by_kv_head(kv_heads)
        queries, columns, values = query_rows(query, kv_heads), key_columns(keys), values.movedim(0, 1).contiguous()
        for head in range(kv_heads):
            weights = attention_weights(queries[head], columns[head], mask, spec, query.dtype, sinks[head], logits)
            head_out = torch.mm(rounded.view_as(weights).copy_(weights), values[head])
            out_by_kv_head[:, head] = head_out.view(rows, -1, dim)
            if scores is not None:
                scores[mask.first :] += relevance(weights, rows, values[head], self.mean)[:known]
        return out

    def _mask(self, window: int | None) -> Mask:
        if window not in self._masks:
            self._masks[window] = probe_mask(self.request.context_pos, self.request.row_pos, window)
        return self._masks[window]

    def _buffer(self, name: str, count: int, like: torch.Tensor) -> torch.Tensor:
        """Memory for ``count`` rows shaped like those of ``like``; reused by all layers."""
        if name not in self._buffers:
            self._buffers[name] = like.new_empty(count, *like.shape[1:])
        return self._buffers[name]
