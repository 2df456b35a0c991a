"""Attention of rows against float64, and against one causal attention bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import attention64, random_tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from a3_sglang.fusion.row_attention import RowGroup, TorchRowAttention


@st.composite
def batches(draw: st.DrawFn):
    """Query, pools and groups of a batch; slots that no row sees are NaN."""
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([8, 16]))
    sizes = draw(st.lists(st.tuples(st.integers(1, 700), st.integers(1, 80)), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    free = torch.randperm(sum(prompt for prompt, _ in sizes) + 50, generator=generator)
    keys, values = random_tensor(generator, 2, len(free), kv_heads, dim).float()
    groups, rows = [], 0
    for prompt, count in sizes:
        slots, free = free[:prompt], free[prompt:]
        visible = (torch.randperm(prompt, generator=generator)[:count] + 1).sort().values
        keys[slots[visible[-1] :]] = values[slots[visible[-1] :]] = torch.nan
        groups.append(RowGroup(rows, rows + len(visible), slots, visible))
        rows += len(visible)
    keys[free] = values[free] = torch.nan
    return random_tensor(generator, rows, kv_heads * group, dim).float(), keys, values, groups


@settings(max_examples=60, deadline=None)
@given(batches(), st.floats(0.05, 1.5))
def test_rows_equal_float64(batch, scaling):
    query, keys, values, groups = batch
    out = TorchRowAttention().run(query, keys, values, groups, scaling)
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    for group in groups:
        mine = slice(group.begin, group.end)
        exact = attention64(query[mine], keys[group.slots], values[group.slots], group.visible, scaling)
        assert_close(out[mine].double(), exact, rtol=1e-4, atol=2e-5)


@settings(max_examples=10, deadline=None)
@given(batches())
def test_pools_are_not_written(batch):
    query, keys, values, groups = batch
    before = keys.clone(), values.clone()
    TorchRowAttention().run(query, keys, values, groups, 1.0)
    assert_close((keys, values), before, rtol=0, atol=0, equal_nan=True)


def draw_rows(kind: str, prompt: int, generator: torch.Generator) -> torch.Tensor:
    if kind == "all":
        return torch.arange(prompt)
    if kind == "dense":
        return torch.arange(int(torch.randint(0, prompt, (1,), generator=generator)), prompt)
    share = {"few": 0.01, "scattered": 0.15, "half": 0.5, "most": 0.9}[kind]
    return torch.randperm(prompt, generator=generator)[: max(1, int(share * prompt))].sort().values


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's kernel is meant; a GPU has another implementation")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 2)])
@pytest.mark.parametrize("kind", ["all", "dense", "few", "scattered", "half", "most"])
def test_bf16_rows_are_bit_equal_to_one_causal_attention(heads, kv_heads, kind):
    seed = torch.seed() % 2**32
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        prompt, dim = int(torch.randint(300, 2001, (1,), generator=generator)), 64
        query, k, v = (random_tensor(generator, prompt, h, dim).bfloat16() for h in (heads, kv_heads, kv_heads))
        q4, k4, v4 = (part.movedim(0, 1).unsqueeze(0) for part in (query, k, v))
        whole = scaled_dot_product_attention(q4, k4, v4, is_causal=True, enable_gqa=True)[0].movedim(0, 1)
        slots = torch.randperm(prompt + 64, generator=generator)[:prompt]
        keys, values = torch.full((2, prompt + 64, kv_heads, dim), torch.nan).bfloat16()
        rows = draw_rows(kind, prompt, generator)
        keys[slots], values[slots] = k, v
        keys[slots[rows[-1] + 1 :]] = torch.nan
        out = TorchRowAttention().run(query[rows], keys, values, [RowGroup(0, len(rows), slots, rows + 1)], dim**-0.5)
        assert torch.equal(out, whole[rows]), f"{seed=} {prompt=}"
