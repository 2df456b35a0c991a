"""Branches: ids of approximate paths, and the lookup of branches by prompts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3_sglang.matching.branches import GENERATIONS, KINDS, Branch, Branches, prefix_hashes
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.search import find_spans
from a3_sglang.matching.span import Span, merge_spans

tokens = st.lists(st.integers(0, 1 << 20), min_size=1, max_size=60)
branches = st.builds(Branch, st.integers(0, 60), st.integers(1, GENERATIONS), st.integers(0, KINDS - 1))


@given(tokens, branches)
def test_marked_ids_are_not_tokens_but_contain_them(ids, branch):
    path = np.array(ids, np.int64)
    marked = branch.mark(path)
    assert (branch.tokens(marked) == path).all()
    assert (marked[: branch.begin] == path[: branch.begin]).all()
    assert (marked[branch.begin :] >= 1 << 32).all()


@given(tokens, branches, branches)
def test_branches_do_not_share_ids(ids, one, other):
    path = np.array(ids, np.int64)
    begin = max(one.begin, other.begin)
    if (one.generation, one.kind) != (other.generation, other.kind):
        assert (one.mark(path)[begin:] != other.mark(path)[begin:]).all()


@given(tokens, tokens)
def test_hashes_are_those_of_beginnings(ids, others):
    hashes = prefix_hashes("x", ids)
    assert len(hashes) == len(ids) + 1
    assert (prefix_hashes("x", [*ids, *others])[: len(hashes)] == hashes).all()
    assert prefix_hashes("y", ids)[0] != hashes[0]
    if ids[::-1] != ids:
        assert prefix_hashes("x", ids[::-1])[-1] != hashes[-1]


@given(st.data())
def test_finds_the_branches_of_a_prompts_beginnings(data):
    """Compared with a list of all branches, most recently used first; the oldest are forgotten."""
    capacity = data.draw(st.integers(1, 6))
    found, added = Branches(capacity), []
    paths = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=12))
    for path in paths:
        length = data.draw(st.integers(0, len(path)))
        entry = (path[:length], Branch(length, data.draw(st.integers(1, 2))))
        found.add(prefix_hashes("x", path), length, entry[1])
        added = [*(other for other in added if other != entry), entry][-capacity:]
        assert len(found) == len(added)
    prompt = data.draw(st.lists(st.integers(0, 1), max_size=7))
    expected = [branch for path, branch in added[::-1] if prompt[: len(path)] == path]
    assert found.find(prefix_hashes("x", prompt), capacity) == expected
    assert found.find(prefix_hashes("y", prompt), capacity) == []
    found.clear()
    assert found.find(prefix_hashes("x", prompt), capacity) == []


def span(start: int, length: int) -> Span:
    return Span(start, length, None, 1000 + start)


@given(st.data())
def test_other_spans_fill_what_is_left(data):
    shortest, taken, others = 4, [], []
    for spans in (taken, others):
        at = 0
        while at < 60:
            at += data.draw(st.integers(0, 12))
            spans.append(span(at, data.draw(st.integers(shortest, 20))))
            at = spans[-1].end
    both = merge_spans(taken, others, shortest)
    assert both == sorted(both, key=lambda one: one.start)
    assert all(one.end <= other.start for one, other in itertools.pairwise(both))
    assert [one for one in both if one in taken] == taken
    assert all(one.length >= shortest and one.offset == 1000 + one.start for one in both)
    covered = {pos for one in taken for pos in range(one.start, one.end)}
    free = {pos for one in others for pos in range(one.start, one.end)} - covered
    missed = free - {pos for one in both for pos in range(one.start, one.end)}
    # Uncovered pieces are too short.
    for pos in missed:
        begin = end = pos
        while begin - 1 in free:
            begin -= 1
        while end + 1 in free:
            end += 1
        pieces = [o for o in others if o.start <= pos < o.end]
        assert min(end, pieces[0].end - 1) - max(begin, pieces[0].start) + 1 < shortest


@pytest.mark.parametrize("mark", [Branch(20, 1), None])
def test_donors_of_different_marks_do_not_share_segments(mark):
    index = AnyPositionIndex(8)
    path = list(range(100, 180))
    index.add("x", path, mark)
    index.add("x", path, Branch(40, 2))
    assert len(index) == 160
    (found,) = find_spans(index, "x", [1, 2, 3, *path[16:64], 4])
    assert (found.start, found.length, found.offset) == (3, 48, 16)
    assert found.segment.mark == Branch(40, 2)
    index.forget(found.segment, 0)
    (found,) = find_spans(index, "x", [1, 2, 3, *path[16:64], 4])
    assert found.segment.mark == mark
    assert index.known_prefix("x", path) == (80 if mark is None else 0)
