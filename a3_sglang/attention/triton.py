"""Attention on CUDA by the kernels in ``kernels/``.

These are imported when a pass is planned: a machine without a GPU need not have Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from a3_sglang.attention.base import ProbeAttention, ProbeFn, ProbeRows, RequestRows, RowAttention, RowAttentionFn


class TritonRowAttention(RowAttention):
    """One launch per layer for the rows of all requests."""

    def plan(self, requests: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
        from a3_sglang.kernels.row_attention import make_tiles, row_attention

        counts, slots = [r.end - r.begin for r in requests], [r.slots for r in requests]
        tiles = make_tiles(counts, slots, [r.kv_lens for r in requests], heads // kv_heads)
        return lambda query, keys, values, scaling: row_attention(query, keys, values, tiles, scaling)


class TritonProbeAttention(ProbeAttention):
    """Three launches per layer for the probes of all requests."""

    def plan(self, requests: Sequence[ProbeRows], heads: int, kv_heads: int, mean: bool = False) -> ProbeFn:
        from a3_sglang.kernels.probe_attention import probe_attention
        from a3_sglang.kernels.probe_layout import make_layout

        counts, slots = [r.end - r.begin for r in requests], [r.context_slots for r in requests]
        layout = make_layout(counts, slots, heads, kv_heads)
        return lambda query, own, pools, scaling, scores: probe_attention(
            query, *own, *pools, layout, scaling, scores, mean
        )
