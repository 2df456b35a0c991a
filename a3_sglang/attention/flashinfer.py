"""Attention of arbitrary rows by FlashInfer's prefill over paged KV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from a3_sglang.attention.base import AttentionSpec
from a3_sglang.attention.paged import PagedFn, PagedRowAttention, Sequences

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
WORKSPACE = 32 << 20
"""Bytes of FlashInfer's workspace for partial results. Contexts are not split, so there are none; FlashInfer wants a
workspace all the same."""


class FlashInferRowAttention(PagedRowAttention):
    """FlashInfer's paged prefill for the unmasked part.

    A plan is made on the host, before the lengths of the sequences are known there: for whole contexts. FlashInfer's
    kernel takes lengths from the device when it runs, as for CUDA graphs, and these are the true ones.

    Args:
        device: of the KV pool.
        wrapper: replaces ``flashinfer.BatchPrefillWithPagedKVCacheWrapper``.

    Raises:
        ImportError: this machine has no FlashInfer.
    """

    def __init__(self, device: torch.device, wrapper: Callable[..., Any] | None = None) -> None:
        if wrapper is None:
            from flashinfer import BatchPrefillWithPagedKVCacheWrapper

            wrapper = BatchPrefillWithPagedKVCacheWrapper
        self._make_wrapper, self._device = wrapper, device
        self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._planned: list[tuple[Any, Any]] = []

    def plan_paged(self, sequences: Sequences, heads: int, kv_heads: int, dtype: torch.dtype) -> PagedFn:
        from a3_sglang.kernels.row_attention import Start

        planned = None

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> Any:
            nonlocal planned
            if planned is None:
                planned = self._plan(sequences, heads, kv_heads, query.shape[2], dtype)
            # The scaling is not known when the plan is made. Scaling the keys has the same effect on the logits.
            pools = keys.unsqueeze(1), values.unsqueeze(1)
            out, lse = planned.run(query, pools, k_scale=spec.scaling, return_lse=True)
            # Logarithms to base 2, (rows, heads).
            return Start(out, lse, 1.0)

        return attend

    def _plan(self, sequences: Sequences, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Any:
        if dim not in HEAD_DIMS or dtype not in DTYPES:
            raise ValueError(f"FlashInfer has no prefill for heads of {dim} dimensions in {dtype}")
        # Pages of a sequence are consecutive, so the request's slots are repeated for each of its tiles.
        contexts = torch.tensor([len(sequences.slots[owner]) for owner in sequences.requests], dtype=torch.int32)
        page_ends = torch.cat([contexts.new_zeros(1), contexts.cumsum(0, dtype=torch.int32)])
        tiles_of = torch.bincount(torch.tensor(sequences.requests), minlength=len(sequences.slots)).tolist()
        pages = torch.cat(
            [s.int().expand(count, -1).flatten() for s, count in zip(sequences.slots, tiles_of, strict=True)]
        )
        tiles, device = len(sequences.requests), self._device
        last_pages = torch.ones(tiles, dtype=torch.int32, device=device)
        ends, indices = (torch.empty(tiles + 1, dtype=torch.int32, device=device) for _ in range(2))
        wrapper = self._make_wrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=ends,
            paged_kv_indptr_buf=indices,
            paged_kv_indices_buf=pages,
            paged_kv_last_page_len_buf=last_pages,
            backend="fa2",
        )
        wrapper.plan(
            sequences.row_ends,
            page_ends,
            pages,
            torch.ones(tiles, dtype=torch.int32),
            heads,
            kv_heads,
            dim,
            1,
            causal=False,
            sm_scale=1.0,
            q_data_type=dtype,
            kv_data_type=dtype,
            disable_split_kv=True,
        )
        # A sequence has (pages - 1) * page size + last page positions. Pages have one position, so with this "last
        # page", which is negative, it has as many as its tile attends to.
        last_pages.copy_(sequences.lengths - contexts.to(device, non_blocking=True) + 1)
        self._keep(wrapper)
        return wrapper

    def _keep(self, wrapper: Any) -> None:
        """Keep the wrapper, whose page-locked memory FlashInfer copies from, until the device has read it."""
        self._planned = [(kept, read) for kept, read in self._planned if not read.query()]
        if self._device.type == "cuda":
            read = torch.cuda.Event()
            read.record()
            self._planned.append((wrapper, read))
