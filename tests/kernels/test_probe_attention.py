"""A question's attention and what it takes from its context, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.attention.base import ProbeRows
from a3_sglang.attention.torch_cpu import TorchProbeAttention
from a3_sglang.attention.triton import TritonProbeAttention
from helpers.reference import random_tensor, weights64

IMPLEMENTATIONS = {"torch": TorchProbeAttention, "triton": TritonProbeAttention}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def batches(draw: st.DrawFn):
    """Query, own KV, pools and questions of a batch; slots that no question knows are NaN."""
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([8, 16]))
    sizes = draw(st.lists(st.tuples(st.integers(0, 700), st.integers(1, 64)), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    free = torch.randperm(sum(context for context, _ in sizes) + 50, generator=generator)
    pools = random_tensor(generator, 2, len(free), kv_heads, dim).float()
    questions, rows = [], 0
    for context, count in sizes:
        known, free = free[:context], free[context:]
        questions.append(ProbeRows(rows, rows + count, known))
        rows += count
    pools[:, free] = torch.nan
    query, *own = (random_tensor(generator, rows, h, dim).float() for h in (kv_heads * group, kv_heads, kv_heads))
    return query, tuple(own), tuple(pools), questions


def run(implementation, batch, scaling):
    """Output and scores, with what the scores held before."""
    query, own, pools, questions = batch
    moved = [ProbeRows(q.begin, q.end, q.known.to(DEVICE)) for q in questions]
    ask = implementation().plan(moved, query.shape[1], own[0].shape[1])
    own, pools = (tuple(x.to(DEVICE) for x in kv) for kv in (own, pools))
    before = torch.rand(sum(len(q.known) for q in questions))
    scores = before.to(DEVICE, copy=True)
    out = ask(query.to(DEVICE), own, pools, scaling, scores)
    assert_close(ask(query.to(DEVICE), own, pools, scaling, None), out, rtol=0, atol=0)
    return out.cpu(), scores.cpu() - before


def exact(batch, scaling):
    query, own, pools, questions = batch
    group = query.shape[1] // own[0].shape[1]
    out, scores = [], []
    for question in questions:
        rows = slice(question.begin, question.end)
        keys, values = (
            torch.cat([pool[question.known], fresh[rows]]).double() for pool, fresh in zip(pools, own, strict=True)
        )
        count = question.end - question.begin
        weights = weights64(query[rows], keys, torch.arange(1, count + 1) + len(question.known), scaling)
        values = values.repeat_interleave(group, 1)
        out.append(torch.einsum("rhn,nhd->rhd", weights, values))
        taken = (weights.pow(2).mean(0).sqrt() * values.norm(dim=-1).T).sum(0)
        scores.append(taken[: len(question.known)])
    return torch.cat(out), torch.cat(scores)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=12, deadline=None)
@given(batches(), st.floats(0.05, 1.5))
def test_questions_equal_float64(name, batch, scaling):
    out, scores = run(IMPLEMENTATIONS[name], batch, scaling)
    expected, taken = exact(batch, scaling)
    assert out.shape == batch[0].shape
    assert_close(out.double(), expected, rtol=1e-4, atol=2e-5)
    assert_close(scores.double(), taken, rtol=1e-4, atol=1e-5)


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
def test_triton_questions_in_half_precision(dtype, kept, batch, scaling):
    """Rounding of the weights and of the result is all that is lost: inputs are exact in both computations."""
    query, own, pools, questions = batch
    batch = (query.to(dtype), tuple(x.to(dtype) for x in own), tuple(x.to(kept) for x in pools), questions)
    out, scores = run(TritonProbeAttention, batch, scaling)
    expected, taken = exact((*batch[:2], tuple(x.to(dtype) for x in batch[2]), questions), scaling)
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()
    assert (scores.double() - taken).norm() <= 1e-2 * taken.norm()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=5, deadline=None)
@given(batches())
def test_a_question_answers_alike_alone_and_in_a_batch(name, batch):
    query, own, pools, questions = batch
    out, scores = run(IMPLEMENTATIONS[name], batch, 0.3)
    at = 0
    for question in questions:
        rows = slice(question.begin, question.end)
        alone = ProbeRows(0, question.end - question.begin, question.known)
        by_itself = run(IMPLEMENTATIONS[name], (query[rows], tuple(x[rows] for x in own), pools, [alone]), 0.3)
        assert_close(out[rows], by_itself[0], rtol=0, atol=0)
        assert_close(scores[at : at + len(question.known)], by_itself[1], rtol=0, atol=1e-6)
        at += len(question.known)
