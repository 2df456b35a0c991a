"""The paged attention of two libraries, by their documented rules, in float64 on any device."""

from __future__ import annotations

from typing import Any

import torch


def attend64(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (rows, heads, dim) of rows that attend to all of ``slots``, and the natural logarithm of their sums."""
    k, v = (
        pool[slots.long()].double().repeat_interleave(query.shape[1] // pool.shape[1], 1) for pool in (keys, values)
    )
    logits = torch.einsum("rhd,nhd->rhn", query.double(), k) * scaling
    return torch.einsum("rhn,nhd->rhd", logits.softmax(-1), v), logits.logsumexp(-1)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    page_table: torch.Tensor,
    cache_batch_idx: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    causal: bool,
    softmax_scale: float,
    pack_gqa: bool,
    num_splits: int,
    return_softmax_lse: bool,
) -> tuple[torch.Tensor, ...]:
    """FlashAttention 3 over pages of one slot: sequence i is row ``cache_batch_idx[i]`` of the page table."""
    assert k_cache.shape[1] == v_cache.shape[1] == 1
    assert not causal
    assert return_softmax_lse
    for table in (page_table, cache_batch_idx, cache_seqlens, cu_seqlens_q):
        assert table.dtype == torch.int32
        assert table.device == q.device
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q), device=q.device)
    ends = cu_seqlens_q.tolist()
    assert len(cache_batch_idx) == len(cache_seqlens) == len(ends) - 1
    assert ends[-1] == len(q)
    for i, length in enumerate(cache_seqlens.tolist()):
        rows = slice(ends[i], ends[i + 1])
        assert 0 < rows.stop - rows.start <= max_seqlen_q
        pages = page_table[cache_batch_idx[i], :length]
        exact, sums = attend64(q[rows], k_cache[:, 0], v_cache[:, 0], pages, softmax_scale)
        out[rows], lse[:, rows] = exact.to(q.dtype), sums.T.float()
    return out, lse


class PrefillWrapper:
    """FlashInfer's ``BatchPrefillWithPagedKVCacheWrapper`` with buffers of the caller, as for CUDA graphs.

    A plan reads its tables on the host and copies them into the buffers; a run reads the buffers alone.
    """

    def __init__(self, workspace: torch.Tensor, layout: str, *, use_cuda_graph: bool, backend: str, **buffers: Any):
        assert (layout, use_cuda_graph, backend) == ("NHD", True, "fa2")
        names = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
        self._buffers = [buffers.pop(name) for name in names]
        assert not buffers

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        heads: int,
        kv_heads: int,
        dim: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        disable_split_kv: bool,
    ) -> None:
        assert page_size == 1
        assert not causal
        assert disable_split_kv
        on_host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
        assert all(table.device.type == "cpu" for table in on_host)
        assert int(paged_kv_indptr[-1]) == len(paged_kv_indices)
        for buffer, table in zip(
            self._buffers, (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len), strict=True
        ):
            assert buffer.dtype == table.dtype == torch.int32
            buffer.copy_(table)
        self._planned = paged_kv_indptr.diff()
        self._sm_scale, self._shape = sm_scale, (heads, kv_heads, dim)

    def run(self, query: torch.Tensor, pools: tuple[torch.Tensor, torch.Tensor], *, k_scale: float, return_lse: bool):
        assert return_lse
        assert (query.shape[1], pools[0].shape[2], query.shape[2]) == self._shape
        ends, indptr, indices, last_page = (buffer.cpu() for buffer in self._buffers)
        out, lse = torch.empty_like(query), torch.empty(query.shape[:2], device=query.device)
        for i in range(len(last_page)):
            rows, begin = slice(int(ends[i]), int(ends[i + 1])), int(indptr[i])
            # The kernel computes in uint32: (pages - 1) * page size + last page.
            length = (int(indptr[i + 1]) - begin - 1 + int(last_page[i])) % 2**32
            assert 0 < length <= self._planned[i]
            pages = indices[begin : begin + length].to(query.device)
            exact, sums = attend64(query[rows], pools[0][:, 0], pools[1][:, 0], pages, self._sm_scale * k_scale)
            out[rows], lse[rows] = exact.to(query.dtype), (sums / torch.log(torch.tensor(2.0))).float()
        return out, lse
