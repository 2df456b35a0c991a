"""Attention of arbitrary rows through FlashInfer's prefill over paged KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from a3_sglang.attention.base import Attention, RequestRows, RowAttention
from a3_sglang.attention.triton import TritonRowAttention

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
MOST_PAIRS = 1 << 31
"""Rows times positions of a group, above which the bits for them are counted wrongly; they would be a lot, too."""
WORKSPACE = 384 << 20
"""Bytes for the shares of long contexts, as much as SGLang gives its own FlashInfer backend."""


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows of several requests as FlashInfer takes them: a group is a sequence, a slot is a page.

    FlashInfer knows no rows that see less than those behind them and are no neighbours; it takes a bit for every row
    and position instead. So that rows begin at whole bytes, contexts are filled up to a multiple of 8 positions.

    Attributes:
        row_ends: int32 (groups + 1,), on the host; where each group's rows begin and end.
        slot_ends: like ``row_ends``, in ``slots``.
        byte_ends: like ``row_ends``, in ``mask``.
        slots: int32 (sum of filled-up contexts,).
        mask: uint8 (sum of rows x filled-up context / 8,), the first position in the lowest bit.
    """

    row_ends: torch.Tensor
    slot_ends: torch.Tensor
    byte_ends: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, groups: Sequence[RequestRows]) -> PagedRows:
        """Lay out a batch of rows; reads nothing back from the device."""
        rows = [len(group.visible) for group in groups]
        contexts = [len(group.slots) + -len(group.slots) % 8 for group in groups]
        return cls(
            _ends(rows),
            _ends(contexts),
            _ends([count * context // 8 for count, context in zip(rows, contexts, strict=True)]),
            torch.cat([_slots(group, context) for group, context in zip(groups, contexts, strict=True)]).int(),
            torch.cat([_bits(group, context).flatten() for group, context in zip(groups, contexts, strict=True)]),
        )


def _ends(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _slots(group: RequestRows, context: int) -> torch.Tensor:
    """What no row sees is read all the same, and a mask does not stop NaN: it is the first slot, which all see."""
    first = group.slots[:1]
    filled = torch.cat([group.slots, first.expand(context - len(group.slots))])
    return filled.where(torch.arange(context, device=first.device) < group.visible[-1], first)


def _bits(group: RequestRows, context: int) -> torch.Tensor:
    """uint8 (rows, context / 8)."""
    before = torch.arange(0, context, 8, dtype=torch.int32, device=group.visible.device)
    bits = (group.visible.int()[:, None] - before).clamp_(0, 8)
    return ((1 << bits) - 1).to(torch.uint8)


class FlashInferRowAttention(RowAttention):
    """One launch a layer for the rows of all requests, planned once a pass. A pass is over when the next is planned.

    FlashInfer could leave out what no row sees if it were told on the host which rows there are; that would wait for
    the device. So every row goes over its whole context.

    Args:
        device: of the KV pool.
    """

    def __init__(self, device: Any) -> None:
        self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._planned: list[tuple[Any, torch.cuda.Event]] = []

    def plan(self, groups: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> Attention:
        if any(len(group.visible) * len(group.slots) >= MOST_PAIRS for group in groups):
            return TritonRowAttention().plan(groups, heads, kv_heads, dtype)
        paged, wrapper = PagedRows.of(groups), None

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
            nonlocal wrapper
            if wrapper is None:
                wrapper = self._wrapper(paged, heads, kv_heads, query.shape[2], dtype)
            # A factor of the keys is one of the logits, and is not part of the plan.
            return wrapper.run(query, (keys.unsqueeze(1), values.unsqueeze(1)), k_scale=scaling)

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
        # FlashInfer 0.6 and 0.7 take a packed mask's beginnings for counts of bits, as they are without packing, but
        # read them as bytes.
        wrapper._mask_indptr_buf = paged.byte_ends.to(paged.mask.device, non_blocking=True)
        planned = torch.cuda.Event()
        planned.record()
        self._planned.append((wrapper, planned))
        return wrapper

    def _idle_wrapper(self) -> Any:
        """A wrapper whose last plan has left the host; until then a new plan would overwrite it there."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        for i, (_, planned) in enumerate(self._planned):
            if planned.query():
                return self._planned.pop(i)[0]
        return BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
