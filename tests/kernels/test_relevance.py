"""Attention weights on a CPU and relevance, against float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.attention.base import AttentionSpec
from a3_sglang.attention.relevance import attention_weights, causal_mask, key_columns, query_rows, relevance
from helpers.reference import random_tensor, seen_by, weights64


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    context=st.integers(1, 120),
    kv_heads=st.integers(1, 4),
    group=st.sampled_from([1, 3, 4]),
    scaling=st.floats(0.05, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mean=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_relevance_equals_float64(rows, context, kv_heads, group, scaling, dtype, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    query = random_tensor(generator, rows, kv_heads * group, 16).to(dtype)
    keys = random_tensor(generator, context, kv_heads, 16).to(dtype)
    kv_lens = torch.randint(1, context + 1, (rows,), generator=generator)
    keys = keys[: int(kv_lens.max())]
    queries, columns, mask = query_rows(query, kv_heads), key_columns(keys), causal_mask(kv_lens)
    weights = torch.stack(
        [attention_weights(*head, mask, AttentionSpec(scaling), dtype) for head in zip(queries, columns, strict=True)]
    )
    values = random_tensor(generator, len(keys), kv_heads, 16).to(dtype)
    found = sum(relevance(weights[head].clone(), rows, values[:, head], mean) for head in range(kv_heads))
    exact = weights64(query, keys, seen_by(kv_lens, len(keys), None), AttentionSpec(scaling))
    grouped = exact.unflatten(1, (kv_heads, group)).movedim(1, 0).flatten(1, 2)
    assert weights.dtype == found.dtype == torch.float32
    assert_close(weights.double(), grouped, rtol=1e-4, atol=1e-5)
    sizes = values.double().norm(dim=-1).repeat_interleave(group, 1)
    expected = exact.mean(0).sum(0) if mean else (exact.pow(2).mean(0).sqrt() * sizes.T).sum(0)
    assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_position_that_few_rows_attend_to_has_little_relevance_and_large_logits_stay_finite():
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    query, keys = random_tensor(generator, 5, 4, 16) * 100, random_tensor(generator, 30, 2, 16) * 100
    mask, queries = causal_mask(torch.arange(26, 31)), query_rows(query.float(), 2)
    columns, values = key_columns(keys), torch.nn.functional.normalize(keys.float(), dim=-1)
    weights = torch.stack(
        [
            attention_weights(*head, mask, AttentionSpec(1.0), torch.float32)
            for head in zip(queries, columns, strict=True)
        ]
    )
    found = sum(relevance(weights[head].clone(), 5, values[:, head]) for head in range(2))
    assert torch.isfinite(weights).all()
    # One row of five attends to the last position, in 4 heads.
    assert found[29] <= 4 * (1 / 5) ** 0.5
    assert (weights.view(2, 5, 2, 30)[:, :4, :, 29] == 0).all()
    # Weights of each row add up to 1 in each of the 4 heads.
    assert_close(weights.sum(), torch.tensor(20.0))
