"""Attention on CUDA by the kernels in ``kernels/``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from a3_sglang.attention.base import Attention, ProbeAttention, ProbeFn, ProbeRows, RequestRows, RowAttention


class TritonRowAttention(RowAttention):
    """One launch a layer for the rows of all requests, on CUDA devices."""

    def plan(self, groups: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> Attention:
        # Imported here: a machine without a GPU need not have Triton.
        from a3_sglang.kernels.row_attention import make_tiles, row_attention

        counts, slots = [g.end - g.begin for g in groups], [g.slots for g in groups]
        tiles = make_tiles(counts, slots, [g.visible for g in groups], heads // kv_heads)
        return lambda query, keys, values, scaling: row_attention(query, keys, values, tiles, scaling)


class TritonProbeAttention(ProbeAttention):
    """A few launches a layer for the questions of all requests, on CUDA devices."""

    def plan(self, questions: Sequence[ProbeRows], heads: int, kv_heads: int) -> ProbeFn:
        # Imported here: a machine without a GPU need not have Triton.
        from a3_sglang.kernels.probe_attention import make_layout, probe_attention

        counts, known = [q.end - q.begin for q in questions], [q.known for q in questions]
        layout = make_layout(counts, known, heads, kv_heads)
        return lambda query, own, pools, scaling, scores: probe_attention(query, own, *pools, layout, scaling, scores)
