"""Attention on CUDA by the kernels in ``kernels/``.

These are imported when a pass is planned: a machine without a GPU need not have Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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


class TritonRowAttention(RowAttention):
    """One launch per layer for the rows of all requests."""

    def plan(self, requests: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
        from a3_sglang.kernels.row_attention import make_tiles, row_attention

        counts, slots = [r.end - r.begin for r in requests], [r.slots for r in requests]
        tiles = make_tiles(counts, slots, [r.kv_lens for r in requests], heads // kv_heads)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
            spec.check_plain("the kernel for row attention")
            return row_attention(query, keys, values, tiles, spec.scaling)

        return attend


class TritonProbeAttention(ProbeAttention):
    """Three launches per layer for the probes of all requests."""

    def plan(self, requests: Sequence[ProbeRows], heads: int, kv_heads: int, mean: bool = False) -> ProbeFn:
        from a3_sglang.kernels.probe_attention import probe_attention
        from a3_sglang.kernels.probe_layout import make_layout

        counts, slots = [r.end - r.begin for r in requests], [r.context_slots for r in requests]
        layout = make_layout(counts, slots, heads, kv_heads)

        def attend(
            query: torch.Tensor, own: KV, pools: KV, spec: AttentionSpec, scores: torch.Tensor | None
        ) -> torch.Tensor:
            spec.check_plain("the kernel for the probe's attention")
            return probe_attention(query, *own, *pools, layout, spec.scaling, scores, mean)

        return attend
