"""The selection of rows by kernels, for several requests at once, against float64 and against PyTorch's operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from a3_sglang.drift import model, selection
from a3_sglang.drift.model import DEFAULT, MAX_BLOCK, PaddedBlocks
from a3_sglang.drift.selection import select_a_optimal, select_by_kernels
from helpers.drift import covariance64, drawn_model, drawn_weights, greedy64, offsets_of, posterior

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

requests = st.lists(
    st.tuples(st.integers(0, 2**31), st.lists(st.integers(1, 60), min_size=1, max_size=3), st.floats(0.02, 1)),
    min_size=1,
    max_size=2,
)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round takes a second in the interpreter."""
    monkeypatch.setattr(selection, "ROUNDS", 3)


def select(weights, lengths, counts, drift=DEFAULT):
    picked = select_by_kernels(drift, [weight.to(DEVICE) for weight in weights], lengths, counts)
    for rows, weight, count in zip(picked, weights, counts, strict=True):
        assert rows.dtype == torch.int64
        assert len(rows) == len(set(rows.tolist())) == count
        assert not count or 0 <= int(rows.min()) <= int(rows.max()) < len(weight)
    return [rows.cpu() for rows in picked]


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(requests, st.sampled_from([7, MAX_BLOCK]), st.sampled_from([2.5, 1e9]))
def test_rows_are_chosen_by_the_definition(drawn, block, factor):
    weights, drift = [drawn_weights(seed, sum(lengths)) for seed, lengths, _ in drawn], drawn_model(drawn[0][0])
    lengths = [spans for _, spans, _ in drawn]
    counts = [max(1, int(share * len(weight))) for weight, (_, _, share) in zip(weights, drawn, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "MAX_BLOCK", block)
        patch.setattr(selection, "CANDIDATE_FACTOR", factor)
        chosen = select(weights, lengths, counts, drift)
        by_torch = [
            select_a_optimal(drift, weight, PaddedBlocks(spans, "cpu"), count)
            for weight, spans, count in zip(weights, lengths, counts, strict=True)
        ]
    for weight, spans, count, rows, other in zip(weights, lengths, counts, chosen, by_torch, strict=True):
        covariance = covariance64(offsets_of(spans), block, drift.keys)
        expected = other if factor < 10 else torch.tensor(greedy64(covariance, weight, count))
        # Rows of nearly the same gain may be swapped.
        assert posterior(covariance, weight, rows) <= posterior(covariance, weight, expected) + 0.005
        assert len(set(rows.tolist()) & set(expected.tolist())) >= 0.9 * count - 1


def test_a_request_gets_the_same_rows_alone_and_in_a_batch():
    spans = [[150, 90], [40], [60, 61]]
    weights, counts = [drawn_weights(seed, sum(part)) for seed, part in enumerate(spans)], [30, 7, 20]
    together = select(weights, spans, counts)
    for request in range(len(spans)):
        assert torch.equal(select([weights[request]], [spans[request]], [counts[request]])[0], together[request])


def test_many_rows_of_one_block_are_conditioned_on_exactly():
    """All weight is in one block, so that a round picks more of its rows than are eliminated at once."""
    spans, weight = [90, 120, 90], torch.full((300,), 1e-6)
    weight[90:210] = drawn_weights(torch.seed() % 2**31, 120)
    count = 110
    chosen = select([weight], [spans], [count])[0]
    expected = select_a_optimal(DEFAULT, weight, PaddedBlocks(spans, "cpu"), count)
    covariance = covariance64(offsets_of(spans), MAX_BLOCK)
    assert posterior(covariance, weight, chosen) <= posterior(covariance, weight, expected) + 1e-4
    assert len(set(chosen.tolist()) & set(expected.tolist())) >= 0.97 * count


def test_large_and_equal_weights():
    large = torch.ones(50)
    large[7] = torch.finfo(torch.float32).max
    chosen, equal, none = select([large, torch.zeros(30), torch.ones(3)], [[50], [30], [3]], [8, 30, 0])
    # Rows of a round are in ascending order.
    assert 7 in chosen
    assert equal.sort().values.tolist() == list(range(30))
    assert len(none) == 0
