"""Attention of arbitrary rows by FlashInfer's prefill over paged KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from a3_sglang.attention.base import AttentionSpec, RequestRows, RowAttention, RowAttentionFn
from a3_sglang.attention.triton import TritonRowAttention

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
MAX_PAIRS = 1 << 31
"""Rows x positions per request: above it FlashInfer's int32 count of mask bits overflows, and the mask has 256 MiB."""
WORKSPACE = 384 << 20
"""Bytes for partial results over long contexts, as much as SGLang gives its own FlashInfer backend."""


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows of several requests as FlashInfer takes them: a request is a sequence, a slot is a page.

    FlashInfer's causal mask assumes consecutive query positions. Ours have gaps, so each (row, position) pair gets a
    bit of an explicit mask. Contexts are padded to a multiple of 8 positions, so that rows begin at whole bytes.

    Attributes:
        row_ends: int32 (requests + 1,), on the host; the bounds of each request's rows.
        slot_ends: like ``row_ends``, in ``slots``.
        byte_ends: like ``row_ends``, in ``mask``.
        slots: int32 (sum of padded contexts,).
        mask: uint8 (sum of rows x padded context / 8,), the first position in the lowest bit.
    """

    row_ends: torch.Tensor
    slot_ends: torch.Tensor
    byte_ends: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, requests: Sequence[RequestRows]) -> PagedRows:
        """Lay out the rows of a pass; forces no host-device sync."""
        rows = [len(request.kv_lens) for request in requests]
        contexts = [len(request.slots) + -len(request.slots) % 8 for request in requests]
        return cls(
            _ends(rows),
            _ends(contexts),
            _ends([count * context // 8 for count, context in zip(rows, contexts, strict=True)]),
            torch.cat([_padded_slots(request, n) for request, n in zip(requests, contexts, strict=True)]).int(),
            torch.cat([_mask_bytes(request, n).flatten() for request, n in zip(requests, contexts, strict=True)]),
        )


def _ends(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _padded_slots(request: RequestRows, context: int) -> torch.Tensor:
    """Slots of the context; those that no row attends to are the first slot.

    FlashInfer reads masked positions too, and NaN survives the mask.
    """
    first = request.slots[:1]
    padded = torch.cat([request.slots, first.expand(context - len(request.slots))])
    return padded.where(torch.arange(context, device=first.device) < request.kv_lens[-1], first)


def _mask_bytes(request: RequestRows, context: int) -> torch.Tensor:
    """uint8 (rows, context / 8)."""
    byte_begins = torch.arange(0, context, 8, dtype=torch.int32, device=request.kv_lens.device)
    bits = (request.kv_lens.int()[:, None] - byte_begins).clamp_(0, 8)
    return ((1 << bits) - 1).to(torch.uint8)


class FlashInferRowAttention(RowAttention):
    """One launch per layer for the rows of all requests, planned once per pass; passes must not overlap.

    FlashInfer could skip the context that no row attends to if the positions were known on the host; reading them would
    force a host-device sync. So every row goes over its whole context.

    Args:
        device: of the KV pool.
    """

    def __init__(self, device: Any) -> None:
        self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._planned: list[tuple[Any, torch.cuda.Event]] = []

    def plan(self, requests: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
        if any(len(request.kv_lens) * len(request.slots) >= MAX_PAIRS for request in requests):
            return TritonRowAttention().plan(requests, heads, kv_heads, dtype)
        paged, wrapper = PagedRows.of(requests), None

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
            nonlocal wrapper
            spec.check_plain("FlashInfer's prefill over rows with gaps")
            if wrapper is None:
                wrapper = self._wrapper(paged, heads, kv_heads, query.shape[2], dtype)
            # The scaling is not known when the plan is made. Scaling the keys has the same effect on the logits.
            return wrapper.run(query, (keys.unsqueeze(1), values.unsqueeze(1)), k_scale=spec.scaling)

        return attend

    def _wrapper(self, paged: PagedRows, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Any:
        if dim not in HEAD_DIMS or dtype not in DTYPES:
            raise ValueError(f"FlashInfer has no prefill for heads of {dim} dimensions in {dtype}")
        wrapper = self._idle_wrapper()
        wrapper.plan(
            paged.row_ends,
            paged.slot_ends,
            paged.slots,
            torch.ones(len(paged.slot_ends) - 1, dtype=torch.int32),
            heads,
            kv_heads,
            dim,
            1,
            packed_custom_mask=paged.mask,
            sm_scale=1.0,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        # FlashInfer 0.6 and 0.7 compute the offsets of a packed mask in bits, as for an unpacked one, but read them as
        # bytes.
        wrapper._mask_indptr_buf = paged.byte_ends.to(paged.mask.device, non_blocking=True)
        planned = torch.cuda.Event()
        planned.record()
        self._planned.append((wrapper, planned))
        return wrapper

    def _idle_wrapper(self) -> Any:
        """A wrapper whose last plan has been copied to the device; until then a new plan would overwrite it."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        for i, (_, planned) in enumerate(self._planned):
            if planned.query():
                return self._planned.pop(i)[0]
        return BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
