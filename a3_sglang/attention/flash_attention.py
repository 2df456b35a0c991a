"""Attention of arbitrary rows by FlashAttention 3 over paged KV, the build that SGLang ships."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from a3_sglang.attention.base import AttentionSpec
from a3_sglang.attention.paged import PagedFn, PagedRowAttention, Sequences


class FlashAttention3RowAttention(PagedRowAttention):
    """FlashAttention 3 for the unmasked part. It takes lengths on the device, so the host needs no positions.

    Args:
        device: of the KV pool.
        kernel: replaces ``sgl_kernel.flash_attn.flash_attn_with_kvcache``.

    Raises:
        ImportError: this machine has no ``sgl_kernel``.
    """

    def __init__(self, device: torch.device, kernel: Callable[..., Any] | None = None) -> None:
        if kernel is None:
            from sgl_kernel.flash_attn import flash_attn_with_kvcache

            kernel = flash_attn_with_kvcache
        self._device, self._kernel = device, kernel

    def plan_paged(self, sequences: Sequences, heads: int, kv_heads: int, dtype: torch.dtype) -> PagedFn:
        from a3_sglang.kernels.common import LOG2E
        from a3_sglang.kernels.row_attention import Start

        device = self._device
        # One row of slots per request, padded with any slot; a tile says which row is its own.
        longest = max(map(len, sequences.slots))
        pages = torch.stack([_padded(slots, longest) for slots in sequences.slots]).int()
        owners = torch.tensor(sequences.requests, dtype=torch.int32).to(device, non_blocking=True)
        row_ends, most = sequences.row_ends.to(device, non_blocking=True), sequences.max_rows

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> Any:
            out, lse, *_ = self._kernel(
                q=query,
                k_cache=keys.unsqueeze(1),
                v_cache=values.unsqueeze(1),
                page_table=pages,
                cache_batch_idx=owners,
                cache_seqlens=sequences.lengths,
                cu_seqlens_q=row_ends,
                max_seqlen_q=most,
                causal=False,
                softmax_scale=spec.scaling,
                pack_gqa=True,
                num_splits=1,
                return_softmax_lse=True,
            )
            # Natural logarithms, (heads, rows).
            return Start(out, lse.T, LOG2E)

        return attend


def _padded(slots: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([slots, slots[:1].expand(count - len(slots))])
