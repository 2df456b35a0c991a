"""The probe's attention and the relevance of its context, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.attention.base import AttentionSpec, ProbeRows
from a3_sglang.attention.torch_cpu import TorchProbeAttention
from a3_sglang.attention.triton import TritonProbeAttention
from helpers.reference import random_tensor, specs, weights64

IMPLEMENTATIONS = {"torch": TorchProbeAttention, "triton": TritonProbeAttention}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def batches(draw: st.DrawFn):
    """Query, own KV, pools and requests of a batch; slots that no request attends to are NaN."""
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([8, 16]))
    sizes = draw(st.lists(st.tuples(st.integers(0, 700), st.integers(1, 64)), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    free = torch.randperm(sum(context for context, _ in sizes) + 50, generator=generator)
    pools = random_tensor(generator, 2, len(free), kv_heads, dim).float()
    requests, rows = [], 0
    for context, count in sizes:
        slots, free = free[:context], free[context:]
        # Gaps before the probe are not in the context.
        context_pos = torch.randperm(context + 100, generator=generator)[:context].sort().values
        requests.append(ProbeRows(rows, rows + count, slots, context_pos, context + 100 + torch.arange(count)))
        rows += count
    pools[:, free] = torch.nan
    query, *own = (random_tensor(generator, rows, h, dim).float() for h in (kv_heads * group, kv_heads, kv_heads))
    return query, tuple(own), tuple(pools), requests


def run(implementation, batch, spec, mean=False):
    """Output, and what was added to the scores."""
    query, own, pools, requests = batch
    moved = [
        ProbeRows(r.begin, r.end, *(x.to(DEVICE) for x in (r.context_slots, r.context_pos, r.row_pos)))
        for r in requests
    ]
    attend = implementation().plan(moved, query.shape[1], own[0].shape[1], mean)
    own, pools = (tuple(x.to(DEVICE) for x in kv) for kv in (own, pools))
    before = torch.rand(sum(len(r.context_slots) for r in requests))
    scores = before.to(DEVICE, copy=True)
    out = attend(query.to(DEVICE), own, pools, spec, scores)
    assert_close(attend(query.to(DEVICE), own, pools, spec, None), out, rtol=0, atol=0)
    return out.cpu(), scores.cpu() - before


def exact(batch, spec, mean=False):
    query, own, pools, requests = batch
    group = query.shape[1] // own[0].shape[1]
    out, scores = [], []
    for request in requests:
        rows = slice(request.begin, request.end)
        keys, values = (
            torch.cat([pool[request.context_slots], fresh[rows]]).double()
            for pool, fresh in zip(pools, own, strict=True)
        )
        column_pos = torch.cat([request.context_pos, request.row_pos])
        distance = request.row_pos[:, None] - column_pos
        seen = (distance >= 0) & (distance <= (len(column_pos) + 100 if spec.window is None else spec.window))
        weights = weights64(query[rows], keys, seen, spec)
        values = values.repeat_interleave(group, 1)
        out.append(torch.einsum("rhn,nhd->rhd", weights, values))
        relevance = weights.mean(0) if mean else weights.pow(2).mean(0).sqrt() * values.norm(dim=-1).T
        scores.append(relevance.sum(0)[: len(request.context_slots)])
    return torch.cat(out), torch.cat(scores)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(batches(), st.data(), st.booleans())
def test_probes_equal_float64(name, batch, data, mean):
    spec = data.draw(specs(batch[0].shape[1], st.floats(0.05, 1.5)))
    out, scores = run(IMPLEMENTATIONS[name], batch, spec, mean)
    expected, relevance = exact(batch, spec, mean)
    assert out.shape == batch[0].shape
    assert_close(out.double(), expected, rtol=1e-4, atol=2e-5)
    assert_close(scores.double(), relevance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float16, torch.float8_e5m2),
    ],
)
@settings(max_examples=5, deadline=None)
@given(batches(), st.floats(0.05, 0.5))
def test_triton_probes_in_half_precision(dtype, kept, batch, scaling):
    """Only rounding of the weights and of the result is lost: inputs are the same in both computations."""
    query, own, pools, requests = batch
    batch = (query.to(dtype), tuple(x.to(dtype) for x in own), tuple(x.to(kept) for x in pools), requests)
    spec = AttentionSpec(scaling)
    out, scores = run(TritonProbeAttention, batch, spec)
    expected, relevance = exact((*batch[:2], tuple(x.to(dtype) for x in batch[2]), requests), spec)
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()
    assert (scores.double() - relevance).norm() <= 1e-2 * relevance.norm()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=5, deadline=None)
@given(batches())
def test_a_probe_is_the_same_alone_and_in_a_batch(name, batch):
    query, own, pools, requests = batch
    out, scores = run(IMPLEMENTATIONS[name], batch, AttentionSpec(0.3))
    at = 0
    for request in requests:
        rows = slice(request.begin, request.end)
        single = replace(request, begin=0, end=request.end - request.begin)
        one = query[rows], tuple(x[rows] for x in own), pools, [single]
        alone = run(IMPLEMENTATIONS[name], one, AttentionSpec(0.3))
        assert_close(out[rows], alone[0], rtol=0, atol=0)
        assert_close(scores[at : at + len(request.context_slots)], alone[1], rtol=0, atol=1e-6)
        at += len(request.context_slots)
