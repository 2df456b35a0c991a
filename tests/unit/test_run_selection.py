"""The selection of runs of rows in benchmarks/run_selection.py."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_sglang.drift import model, selection
from a3_sglang.drift.model import DEFAULT, MAX_BLOCK, PaddedBlocks
from a3_sglang.drift.selection import candidates_per_block
from helpers.drift import covariance64, drawn_weights, offsets_of, posterior
from run_selection import select_runs

spans_of_rows = st.lists(st.integers(1, 30), min_size=1, max_size=3)
lengths_of_runs = st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True)


def bounds(spans: list[int], block: int) -> list[tuple[int, int]]:
    """First row of each block and the row after its last."""
    found, start = [], 0
    for length in spans:
        found += [(start + i, start + min(i + block, length)) for i in range(0, length, block)]
        start += length
    return found


def runs_in(rows: set[int], begin: int, end: int) -> int:
    return sum(row in rows and (row == begin or row - 1 not in rows) for row in range(begin, end))


def greedy64(
    spans: list[int], block: int, weight: torch.Tensor, count: int, lengths: list[int], overhead: float
) -> list[int]:
    """Every candidate of every step by its own matrix inverse."""
    covariance = covariance64(offsets_of(spans), block)
    chosen: list[int] = []
    while len(chosen) < count:
        remaining = posterior(covariance, weight, chosen)
        best, rate = [], -1.0
        for begin, end in bounds(spans, block):
            sizes = {min(length, end - begin) for length in lengths}
            for start, size in product(range(begin, end), sizes):
                if start + size <= end:
                    new = [row for row in range(start, start + size) if row not in chosen]
                    if not new:
                        continue
                    more = runs_in({*chosen, *new}, begin, end) - runs_in({*chosen}, begin, end)
                    gain = remaining - posterior(covariance, weight, [*chosen, *new])
                    if gain / (len(new) + overhead * max(more, 0)) > rate:
                        best, rate = new, gain / (len(new) + overhead * max(more, 0))
        chosen += best[: count - len(chosen)]
    return chosen


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    spans_of_rows,
    st.floats(0.05, 0.6),
    lengths_of_runs,
    st.sampled_from([0.0, 0.5, 4.0]),
    st.sampled_from([11, MAX_BLOCK]),
)
def test_runs_are_chosen_by_the_definition(
    seed: int, spans: list[int], share: float, lengths: list[int], overhead: float, block: int
):
    weight, count = drawn_weights(seed, sum(spans)), max(1, int(share * sum(spans)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "MAX_BLOCK", block)
        patch.setattr(selection, "CANDIDATE_FACTOR", float("1e9"))
        chosen = select_runs(DEFAULT, weight, PaddedBlocks(spans, "cpu"), count, lengths, overhead)
    assert chosen.dtype == torch.int64
    assert sorted(chosen.tolist()) == sorted(greedy64(spans, block, weight, count, lengths, overhead))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 90), min_size=1, max_size=5), st.floats(0, 1), st.integers(1, 40))
def test_any_number_of_distinct_rows_within_the_bound_per_block(seed: int, spans: list[int], share: float, length: int):
    blocks, count = PaddedBlocks(spans, "cpu"), round(share * sum(spans))
    chosen = select_runs(DEFAULT, drawn_weights(seed, sum(spans)), blocks, count, [length])
    assert len(chosen) == len(set(chosen.tolist())) == count
    per_block = blocks.pad(torch.zeros(sum(spans)).index_fill_(0, chosen, 1), 0).sum(1)
    assert per_block.max() <= candidates_per_block(blocks, count)


def test_runs_have_the_length_asked_for_but_the_last_which_is_cut():
    spans, length = [200, 300], 16
    for seed in range(5):
        weight = drawn_weights(seed, sum(spans))
        chosen = set(select_runs(DEFAULT, weight, PaddedBlocks(spans, "cpu"), 5 * length, [length]).tolist())
        assert sum(not {*range(row, row + length)} <= chosen for row in chosen if row - 1 not in chosen) <= 1


def test_a_higher_overhead_gives_fewer_runs():
    spans = [300, 40, 200]
    counts = []
    for overhead in (0.0, 2.0, 16.0):
        total = 0
        for seed in range(5):
            weight = drawn_weights(seed, sum(spans))
            chosen = select_runs(DEFAULT, weight, PaddedBlocks(spans, "cpu"), 80, (1, 2, 4, 8, 16), overhead)
            total += runs_in(set(chosen.tolist()), 0, sum(spans))
        counts.append(total)
    assert counts[0] > 1.5 * counts[1] > 1.5 * counts[2]


def test_weights_that_are_all_zero_still_give_rows():
    chosen = select_runs(DEFAULT, torch.zeros(50), PaddedBlocks([50], "cpu"), 11, [4])
    assert len(set(chosen.tolist())) == 11
