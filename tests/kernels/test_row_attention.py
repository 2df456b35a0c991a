"""Attention of rows against float64, and against one causal attention bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from a3_sglang.attention import flashinfer
from a3_sglang.attention.base import AttentionSpec, RequestRows
from a3_sglang.attention.flash_attention import FlashAttention3RowAttention
from a3_sglang.attention.flashinfer import FlashInferRowAttention
from a3_sglang.attention.paged import Sequences
from a3_sglang.attention.torch_cpu import TorchRowAttention
from a3_sglang.attention.triton import TritonRowAttention
from a3_sglang.matching.plan import MIN_TAIL
from helpers.paged import PrefillWrapper, flash_attn_with_kvcache
from helpers.reference import attention64, random_tensor, seen_by, specs


@st.composite
def batches(draw: st.DrawFn):
    """Query, pools and requests of a batch; slots that no row attends to are NaN."""
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([8, 16]))
    sizes = draw(st.lists(st.tuples(st.integers(1, 700), st.integers(1, 80)), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    free = torch.randperm(sum(prompt for prompt, _ in sizes) + 50, generator=generator)
    keys, values = random_tensor(generator, 2, len(free), kv_heads, dim).float()
    requests, rows = [], 0
    for prompt, count in sizes:
        slots, free = free[:prompt], free[prompt:]
        kv_lens = (torch.randperm(prompt, generator=generator)[:count] + 1).sort().values
        keys[slots[kv_lens[-1] :]] = values[slots[kv_lens[-1] :]] = torch.nan
        requests.append(RequestRows(rows, rows + len(kv_lens), slots, kv_lens, draw(st.booleans())))
        rows += len(kv_lens)
    keys[free] = values[free] = torch.nan
    return random_tensor(generator, rows, kv_heads * group, dim).float(), keys, values, requests


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = {
    "torch": TorchRowAttention,
    "triton": TritonRowAttention,
    # The libraries' part by references, the project's kernel for the rest.
    "fa3": partial(FlashAttention3RowAttention, DEVICE, flash_attn_with_kvcache),
    "flashinfer": partial(FlashInferRowAttention, DEVICE, PrefillWrapper),
}


@pytest.fixture(autouse=True)
def every_head_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of FlashInfer has no limits."""
    monkeypatch.setattr(flashinfer, "HEAD_DIMS", range(1, 257))
    monkeypatch.setattr(flashinfer, "DTYPES", (torch.float32, torch.float16, torch.bfloat16))


def run(implementation, query, keys, values, requests, spec):
    attend = implementation().plan(requests, query.shape[1], keys.shape[1], query.dtype)
    return attend(query, keys, values, spec)


def on_device(batch):
    query, keys, values, requests = batch
    requests = [RequestRows(r.begin, r.end, r.slots.to(DEVICE), r.kv_lens.to(DEVICE), r.exact) for r in requests]
    return query.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), requests


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=20, deadline=None)
@given(batches(), st.data())
def test_rows_equal_float64(name, batch, data):
    query, keys, values, requests = batch
    spec = data.draw(specs(query.shape[1], st.floats(0.05, 1.5)))
    out = run(IMPLEMENTATIONS[name], *on_device(batch), spec)
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    for request in requests:
        mine = slice(request.begin, request.end)
        exact = attention64(query[mine], keys[request.slots], values[request.slots], request.kv_lens, spec)
        assert_close(out[mine].double().cpu(), exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["triton", "fa3", "flashinfer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=5, deadline=None)
@given(batches(), st.floats(0.05, 0.5))
def test_rows_in_half_precision(name, dtype, batch, scaling):
    """Only rounding of the weights and of results is lost: inputs are the same in both computations."""
    query, keys, values, requests = (part.to(dtype) if torch.is_tensor(part) else part for part in batch)
    spec = AttentionSpec(scaling)
    out = run(IMPLEMENTATIONS[name], *on_device((query, keys, values, requests)), spec).cpu()
    assert out.dtype == dtype
    for request in requests:
        mine = slice(request.begin, request.end)
        exact = attention64(query[mine], keys[request.slots], values[request.slots], request.kv_lens, spec)
        assert (out[mine].double() - exact).norm() <= 1e-2 * exact.norm()


@settings(max_examples=40, deadline=None)
@given(batches(), st.integers(1, 40))
def test_a_tile_is_a_sequence_over_all_that_its_first_row_attends_to(batch, step):
    requests = batch[3]
    sequences = Sequences.of(requests, step)
    kv_lens = torch.cat([request.kv_lens for request in requests])
    ends = sequences.row_ends.tolist()
    assert (ends[0], ends[-1]) == (0, len(kv_lens))
    assert sequences.max_rows <= step
    for i, (begin, end) in enumerate(pairwise(ends)):
        request = requests[sequences.requests[i]]
        assert request.begin <= begin < end <= request.end
        assert end - begin == step or end == request.end
        assert sequences.lengths[i] == kv_lens[begin:end].min() >= 1
        assert sequences.slots[sequences.requests[i]] is request.slots


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=5, deadline=None)
@given(batches())
def test_pools_are_not_written(name, batch):
    query, keys, values, requests = on_device(batch)
    before = keys.clone(), values.clone()
    run(IMPLEMENTATIONS[name], query, keys, values, requests, AttentionSpec(1.0))
    assert_close((keys, values), before, rtol=0, atol=0, equal_nan=True)


def draw_rows(kind: str, prompt: int, generator: torch.Generator) -> torch.Tensor:
    if kind == "all":
        return torch.arange(prompt)
    if kind == "dense":
        return torch.arange(int(torch.randint(0, prompt - MIN_TAIL, (1,), generator=generator)), prompt)
    # The last rows are the prompt's tail, all of which is computed.
    share, reusable = {"few": 0.01, "scattered": 0.15, "half": 0.5, "most": 0.9}[kind], prompt - MIN_TAIL
    return torch.randperm(reusable, generator=generator)[: max(1, int(share * reusable))].sort().values


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about PyTorch's CPU kernel")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 2)])
@pytest.mark.parametrize("kind", ["all", "dense", "few", "scattered", "half", "most"])
@pytest.mark.parametrize("window", [None, 127, 600])
def test_bf16_rows_equal_one_causal_attention(heads, kv_heads, kind, window):
    """Bit-equal if exact rows are asked for, which all are in the pass then; within rounding otherwise."""
    seed = torch.seed() % 2**32
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        prompt, dim = int(torch.randint(300, 2001, (1,), generator=generator)), 64
        query, k, v = (random_tensor(generator, prompt, h, dim).bfloat16() for h in (heads, kv_heads, kv_heads))
        q4, k4, v4 = (part.movedim(0, 1).unsqueeze(0) for part in (query, k, v))
        # SGLang's torch_native backend masks windows, and lets PyTorch do what is only causal.
        seen = None if window is None else seen_by(torch.arange(1, prompt + 1), prompt, window)
        whole = scaled_dot_product_attention(q4, k4, v4, attn_mask=seen, is_causal=window is None, enable_gqa=True)
        whole = whole[0].movedim(0, 1)
        slots = torch.randperm(prompt + 64, generator=generator)[:prompt]
        keys, values = torch.full((2, prompt + 64, kv_heads, dim), torch.nan).bfloat16()
        rows = draw_rows(kind, prompt, generator)
        keys[slots], values[slots] = k, v
        keys[slots[rows[-1] + 1 :]] = torch.nan
        exact = kind in ("all", "dense")
        request = RequestRows(0, len(rows), slots, rows + 1, exact)
        out = run(TorchRowAttention, query[rows], keys, values, [request], AttentionSpec(dim**-0.5, window))
        if exact:
            assert torch.equal(out, whole[rows]), f"{seed=} {prompt=}"
        else:
            assert_close(out, whole[rows], rtol=2**-6, atol=2**-7)
