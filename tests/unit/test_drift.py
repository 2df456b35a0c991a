"""The selection of rows by the model of drift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.drift import model, selection
from a3_sglang.drift.model import KEYS, MAX_BLOCK, PaddedBlocks
from a3_sglang.drift.selection import select_a_optimal
from helpers.drift import design_covariance64, drawn_weights, posterior64, span_offsets

lengths = st.lists(st.integers(1, 90), min_size=1, max_size=5)


def greedy64(covariance: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    """In rounds; each row by the variance that observing it alone would remove."""
    chosen: list[int] = []
    for part in torch.arange(count).tensor_split(selection.ROUNDS):
        if chosen:
            cross = covariance[:, chosen]
            given_chosen = covariance - cross @ torch.linalg.inv(cross[chosen]) @ cross.T
        else:
            given_chosen = covariance
        open_weight = weight.double().clone()
        open_weight[chosen] = 0
        gain = (given_chosen.square() @ open_weight) / given_chosen.diagonal()
        gain[chosen] = -1
        chosen += gain.argsort(descending=True, stable=True)[: len(part)].tolist()
    return chosen


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), lengths, st.floats(0.02, 1), st.sampled_from([7, MAX_BLOCK]))
def test_rows_are_chosen_by_the_definition(seed: int, spans: list[int], share: float, block: int):
    offsets = span_offsets(spans)
    weight, count = drawn_weights(seed, len(offsets)), max(1, int(share * len(offsets)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "MAX_BLOCK", block)
        patch.setattr(selection, "CANDIDATE_FACTOR", float("1e9"))
        chosen = select_a_optimal(weight, PaddedBlocks(spans, "cpu"), count)
    assert chosen.dtype == torch.int64
    assert len(chosen) == len(set(chosen.tolist())) == count
    covariance = design_covariance64(offsets, block)
    expected = greedy64(covariance, weight, count)
    # Rows of nearly the same gain may be swapped.
    assert posterior64(covariance, weight, chosen) <= posterior64(covariance, weight, torch.tensor(expected)) + 0.005
    assert len(set(chosen.tolist()) & set(expected)) >= 0.9 * count - 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), lengths, st.floats(0, 1))
def test_any_number_of_distinct_rows(seed: int, spans: list[int], share: float):
    offsets = span_offsets(spans)
    count = round(share * len(offsets))
    chosen = select_a_optimal(drawn_weights(seed, len(offsets)), PaddedBlocks(spans, "cpu"), count)
    assert len(chosen) == count
    assert len(set(chosen.tolist())) == count
    assert set(chosen.tolist()) <= set(range(len(offsets)))


def test_less_variance_remains_than_after_picking_the_heaviest_rows():
    """Not in every case, as rows of one round are scored independently, but in total."""
    spans = [300, 40, 600]
    offsets = span_offsets(spans)
    covariance = design_covariance64(offsets, MAX_BLOCK)
    less = []
    for seed in range(20):
        # High attention comes in runs of tokens.
        noise = torch.randn(1, len(offsets), generator=torch.Generator().manual_seed(seed))
        weight = (4 * torch.nn.functional.avg_pool1d(noise, 5, 1, 2)[0]).exp()
        chosen, heaviest = (
            select_a_optimal(weight, PaddedBlocks(spans, "cpu"), 140),
            weight.argsort(descending=True)[:140],
        )
        less.append(posterior64(covariance, weight, heaviest) - posterior64(covariance, weight, chosen))
    assert sum(less) > 0
    assert sum(x > 0 for x in less) > 15


def test_a_row_beside_an_observed_one_gains_little():
    weight = torch.zeros(800)
    weight[[600, 601, 700]] = torch.tensor([1.0, 0.95, 0.9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "ROUNDS", 2)
        assert sorted(select_a_optimal(weight, PaddedBlocks([800], "cpu"), 2).tolist()) == [600, 700]


def test_of_rows_with_equal_weight_those_at_the_beginning_of_a_span_come_first():
    weight = torch.zeros(500)
    weight[[0, 150, 499]] = 1.0
    assert select_a_optimal(weight, PaddedBlocks([500], "cpu"), 3)[0] == 0
    assert KEYS.variance(torch.arange(500)).diff().max() <= 0


def test_the_largest_numbers_do_not_overflow():
    weight = torch.ones(50)
    weight[7] = torch.finfo(torch.float32).max
    chosen = select_a_optimal(weight, PaddedBlocks([50], "cpu"), 8)
    assert chosen[0] == 7
    assert len(set(chosen.tolist())) == 8


def test_weights_that_are_all_zero_still_give_rows():
    chosen = select_a_optimal(torch.zeros(50), PaddedBlocks([50], "cpu"), 8)
    assert_close(chosen.sort().values.unique(), chosen.sort().values)
    assert len(chosen) == 8
