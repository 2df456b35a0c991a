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
    """One launch per layer for the rows of all requests.

    Args:
        shape: of :class:`a3_sglang.kernels.row_attention.TileShape`; by default the one that suits the GPU.
    """

    def __init__(self, shape: tuple[int, int, int, int] | None = None) -> None:
        self._shape = shape

    def plan(self, requests: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
        from a3_sglang.kernels.row_attention import TileShape, default_shape, make_tiles, row_attention

        counts, slots = [r.end - r.begin for r in requests], [r.slots for r in requests]
        shape = TileShape(*self._shape) if self._shape else default_shape()
        tiles = make_tiles(counts, slots, [r.kv_lens for r in requests], heads // kv_heads, shape)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
            return row_attention(query, keys, values, tiles, spec)

        return attend


class TritonProbeAttention(ProbeAttention):
    """Three launches per layer for the probes of all requests."""

    def plan(self, requests: Sequence[ProbeRows], heads: int, kv_heads: int, mean: bool = False) -> ProbeFn:
        from a3_sglang.kernels.probe_attention import probe_attention
        from a3_sglang.kernels.probe_layout import Scratch, make_layout, make_scratch

        slots, context_pos = [r.context_slots for r in requests], [r.context_pos for r in requests]
        layout = make_layout(slots, context_pos, [r.row_pos for r in requests], heads, kv_heads)
        scratch: Scratch | None = None

        def attend(
            query: torch.Tensor, own: KV, pools: KV, spec: AttentionSpec, scores: torch.Tensor | None
        ) -> torch.Tensor:
            nonlocal scratch
            if scratch is None:
                scratch = make_scratch(layout, heads, kv_heads, query.shape[2])
            return probe_attention(query, *own, *pools, layout, scratch, spec, scores, mean)

        return attend
