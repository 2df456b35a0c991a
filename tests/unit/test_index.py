"""Spans found by the any-position index, compared with brute force."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.search import PromptSearch, find_spans
from a3_sglang.matching.segment import Segment
from helpers.spans import places

MIN_SPAN = 8
BLOCK = 4
PAGES = st.sampled_from([1, 1, 2, 3, 16])

Donor = tuple[str, list[int]]


def longest_at(paths: list[list[int]], prompt: list[int], pos: int) -> int:
    """Length of the longest span of whole blocks of one path at a prompt position."""
    best = 0
    for path in paths:
        for offset in range(0, len(path), BLOCK):
            length = 0
            while path[offset + length : offset + length + BLOCK] and (
                prompt[pos + length : pos + length + BLOCK] == path[offset + length : offset + length + BLOCK]
            ):
                length += BLOCK
            best = max(best, length)
    return best


def oracle(donors: list[Donor], namespace: str, prompt: list[int], start: int) -> list[tuple[int, int]]:
    """(start, length) of the spans: from left to right, the longest at the first position that has one."""
    paths, taken, pos = [path for name, path in donors if name == namespace], [], start
    while pos < len(prompt):
        length = longest_at(paths, prompt, pos)
        if length >= MIN_SPAN:
            taken.append((pos, length))
        pos += length if length >= MIN_SPAN else 1
    return taken


def held(donors: list[Donor], namespace: str, path: list[int]) -> int:
    """How many leading tokens of a path the tree still has."""
    return max((shared(path, donor) for name, donor in donors if name == namespace), default=0)


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def evicted(donors: list[Donor], which: int, keep: int, unit: int) -> list[Donor]:
    """The donors after the tree evicted what follows the first ``keep`` tokens of one, on every path through it."""
    space, victim = donors[which % len(donors)]
    keep = min(keep, len(victim)) // unit * unit
    gone = victim[: keep + unit]
    return [(name, path[:keep] if (name, path[: len(gone)]) == (space, gone) else path) for name, path in donors]


@st.composite
def worlds(draw: st.DrawFn, repetitive: bool = False):
    """Donors that are concatenations of shared pieces, evictions, and prompts of the same pieces."""
    if repetitive:
        token = st.integers(0, draw(st.sampled_from([1, 2, 5])))
        pieces = draw(st.lists(st.lists(token, min_size=1, max_size=30), min_size=2, max_size=6))
        text = st.lists(st.sampled_from(range(len(pieces))), min_size=1, max_size=5)
    else:
        lengths = draw(st.lists(st.integers(1, 40), min_size=2, max_size=8))
        pieces = [list(range(100 * i, 100 * i + length)) for i, length in enumerate(lengths)]
        text = st.lists(st.sampled_from(range(len(pieces))), min_size=1, max_size=6, unique=True)
    joined = text.map(lambda which: [t for i in which for t in pieces[i]])
    step = st.one_of(
        st.tuples(st.just("add"), st.sampled_from("xy"), joined),
        st.tuples(st.just("evict"), st.integers(0, 100), st.integers(0, 120)),
    )
    return (
        draw(st.lists(step, min_size=1, max_size=10)),
        draw(joined),
        draw(st.sampled_from("xy")),
        draw(st.integers(0, 10)),
    )


def build(steps, page_size: int, notified: bool) -> tuple[AnyPositionIndex, list[Donor]]:
    """An index after these steps, and what the tree holds.

    Args:
        steps: additions and evictions.
        page_size: of the tree.
        notified: whether evictions are reported to the index at once.
    """
    index = AnyPositionIndex(MIN_SPAN, candidates=10_000, page_size=page_size)
    assert index.block == BLOCK
    unit, donors = math.lcm(BLOCK, page_size), []
    for kind, a, b in steps:
        if kind == "add":
            path = b[: len(b) // unit * unit]
            index.add(a, path)
            donors.append((a, path))
        elif donors:
            donors = evicted(donors, a, b, unit)
            for segment in list(index._segments.values()) if notified else ():
                kept = held(donors, segment.namespace, segment.path(segment.end).tolist())
                if segment.number in index._segments and kept < segment.end:
                    index.forget(segment, kept)
    return index, donors


@settings(max_examples=300, deadline=None)
@given(worlds(), PAGES, st.booleans())
def test_finds_what_brute_force_finds(world, page_size, notified):
    """Both if the index is notified of evictions, and if it notices them when it asks what the tree holds."""
    steps, prompt, namespace, start = world
    index, donors = build(steps, page_size, notified)

    def holds(segment: Segment) -> int:
        return held(donors, segment.namespace, segment.path(segment.end).tolist())

    search = PromptSearch(index, namespace, prompt)
    found = search.spans(start, cached_length=None if notified else holds)
    for span in found:
        path = span.segment.path(span.donor_end).tolist()
        assert prompt[span.start : span.end] == path[span.offset :]
        assert held(donors, namespace, path) == len(path)
        assert span.offset % BLOCK == 0
    expected, unit = oracle(donors, namespace, prompt, start), math.lcm(BLOCK, page_size)
    if unit == BLOCK:
        assert places(found) == expected
    else:
        # Donors branch off at whole units, so blocks of a unit that two donors share only in part may be missed.
        missed = sum(length for _, length in expected) - sum(span.length for span in found)
        assert missed <= (unit + MIN_SPAN) * len(expected)
    if notified:
        assert index.known_prefix(namespace, prompt) == held(donors, namespace, prompt) // unit * unit
    assert search.spans(start, cached_length=holds) == found
    assert search.searches <= 1
    assert len(index) == sum(len(segment.tokens) for segment in index._segments.values())
    assert set(index._roots) == {(segment.namespace, None) for segment in index._segments.values()}


@settings(max_examples=200, deadline=None)
@given(worlds(repetitive=True), PAGES, st.booleans())
def test_what_is_found_in_repetitive_text_is_there(world, page_size, notified):
    """Of equal blocks in one path only the first and the last are followed, so spans may be missed; all are real."""
    steps, prompt, namespace, start = world
    index, donors = build(steps, page_size, notified)
    found = find_spans(
        index, namespace, prompt, start, cached_length=lambda s: held(donors, s.namespace, s.path(s.end).tolist())
    )
    at = start
    for span in found:
        path = span.segment.path(span.donor_end).tolist()
        assert span.start >= at
        assert span.length >= MIN_SPAN
        assert span.offset % BLOCK == span.length % BLOCK == 0
        assert prompt[span.start : span.end] == path[span.offset :]
        assert held(donors, namespace, path) == len(path)
        at = span.end


def test_a_donor_with_the_same_block_twice_is_forgotten_once():
    index = AnyPositionIndex(MIN_SPAN)
    text = list(range(100, 100 + MIN_SPAN))
    index.add("x", [*text, *range(200, 200 + MIN_SPAN), *text, *range(300, 300 + MIN_SPAN)])
    assert find_spans(index, "x", text, cached_length=lambda _: 0) == []
    assert len(index) == 0


@given(st.integers(2, 40), st.integers(2, 40))
def test_text_after_one_repeated_token_is_found(donor, prompt):
    text = list(range(10, 10 + 4 * BLOCK))
    index = AnyPositionIndex(MIN_SPAN)
    index.add("x", [0] * (donor * BLOCK) + text)
    spans = find_spans(index, "x", [1, *[0] * (prompt * BLOCK), *text, 1])
    assert spans[-1].end == 1 + prompt * BLOCK + len(text)
    assert spans[-1].length >= len(text)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_span_is_extended_to_the_ends_of_the_donors_lines(data):
    """By less than a block, over equal tokens, and never beyond what the tree holds."""
    newline = 1
    ends = np.zeros(2, np.bool_)
    ends[newline] = True
    index = AnyPositionIndex(MIN_SPAN, line_ends=ends)
    drawn = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    donor = drawn.integers(10, 1 << 20, 12 * BLOCK)
    # No two blocks are equal.
    donor[::2][drawn.random(len(donor) // 2) < data.draw(st.sampled_from([0.04, 0.2, 1.0]))] = newline
    index.add("x", donor)
    begin = data.draw(st.integers(0, 4 * BLOCK))
    end = data.draw(st.integers(8 * BLOCK, len(donor)))
    prompt = [*drawn.integers(10, 1 << 20, 7), *donor[begin:end], *drawn.integers(10, 1 << 20, 7)]
    held = data.draw(st.sampled_from([len(donor), 9 * BLOCK + 3]))
    spans = find_spans(index, "x", prompt, cached_length=lambda _: held)
    if held < 9 * BLOCK + 3 + BLOCK:
        assert all(span.offset + span.length <= held for span in spans)
        return
    (span,) = spans
    whole = (-(-begin // BLOCK) * BLOCK, end // BLOCK * BLOCK)
    lines = [0, *(np.flatnonzero(donor == newline) + 1)]
    first = min([place for place in lines if begin <= place and whole[0] - BLOCK < place <= whole[0]] or [whole[0]])
    last = max([place for place in lines if place <= end and whole[1] <= place < whole[1] + BLOCK] or [whole[1]])
    if first in lines and begin < first:
        first -= 1  # The token that ends the previous line belongs to the span.
    assert (span.offset, span.offset + span.length) == (first, last)
    assert span.start == 7 + first - begin


def test_the_end_of_a_line_belongs_to_the_span_after_it():
    """Two adjacent lines from two donors: the line end between them becomes the first token of the second span."""
    newline, first, second = 1, list(range(100, 140)), list(range(200, 240))
    ends = np.zeros(2, np.bool_)
    ends[newline] = True
    index = AnyPositionIndex(MIN_SPAN, line_ends=ends)
    index.add("x", [3, 4, newline, *second, newline])
    index.add("x", [5, 6, 7, 8, newline, *first, newline])
    spans = find_spans(index, "x", [9, newline, *first, newline, *second, newline, 9])
    assert [(span.start, span.length, span.offset) for span in spans] == [(1, 41, 4), (42, 42, 2)]
    # A token of the prefix is not moved into the span.
    assert find_spans(index, "x", [9, newline, *first, newline], start=2)[0].start == 2


@given(st.integers(1, 6), st.integers(3 * MIN_SPAN, 160), st.integers(0, 5))
def test_a_text_of_one_repeated_pattern_is_one_span(period, length, shift):
    index = AnyPositionIndex(MIN_SPAN)
    pattern = list(range(period)) * 240
    index.add("x", pattern[:240])
    (span, *more) = find_spans(index, "x", [99, *pattern[shift:][:length], 98])
    assert not more
    assert span.length > length - period - BLOCK


@given(st.integers(2 * BLOCK, 80), st.integers(0, 5), st.integers(1, BLOCK), PAGES)
def test_a_donors_last_tokens_are_matched_with_the_block_before_them(length, place, wrong, page_size):
    """All or nothing: to guess these tokens, a client must guess the whole block before them as well."""
    index = AnyPositionIndex(min_span=MIN_SPAN, page_size=page_size)
    donor = list(range(length))
    index.add("x", donor[: length // page_size * page_size])
    unit = math.lcm(BLOCK, page_size)
    whole, end = length // unit * unit, length // page_size * page_size
    before = list(range(900, 900 + place))
    for prompt, expected in (
        ([*before, *donor, 777], end),
        ([*before, *donor[: max(end - wrong, 0)], 777, 778, 779, 780], None),
    ):
        found = places(find_spans(index, "x", prompt))
        if expected is None:
            expected = whole - BLOCK if end > whole and end - wrong >= whole - BLOCK else (end - wrong) // BLOCK * BLOCK
            expected = min(expected, whole if end == whole else whole - BLOCK)
        if not whole:
            expected = 0
        assert found == ([(place, expected)] if expected >= MIN_SPAN else [])


@given(st.integers(MIN_SPAN, 40), st.integers(1, 20), st.sampled_from([0, 1]))
def test_a_span_continues_into_the_donor_that_continues_it(common, more, which):
    """Donors that diverge share their first segment."""
    index = AnyPositionIndex(min_span=MIN_SPAN)
    donors = [[*range(common), *range(100 * number, 100 * number + 40)] for number in (1, 2)]
    for donor in donors:
        index.add("x", donor[: len(donor) // BLOCK * BLOCK])
    prompt = [*donors[which][: common + more], *range(900, 920)]
    (span,) = find_spans(index, "x", prompt)
    assert (span.start, span.length) == (0, (common + more) // BLOCK * BLOCK)
    assert span.segment.path(span.donor_end).tolist() == prompt[: span.length]


def test_a_conversation_is_one_segment():
    """Each prompt continues the previous one, whatever remained after its last whole block; nothing recurses."""
    index, path, random_tokens = AnyPositionIndex(32), np.arange(100, dtype=np.int32), np.random.default_rng(0)
    for _ in range(3000):
        path = np.concatenate([path, random_tokens.integers(0, 49000, 37, dtype=np.int32)])
        index.add("x", path)
    assert len(index) == len(path)
    assert len(index._segments) == 1
    (span,) = find_spans(index, "x", np.concatenate([np.arange(60_000, 60_005, dtype=np.int32), path]))
    assert (span.start, span.length) == (5, len(path))
    index.forget(span.segment, 0)
    assert len(index) == 0
    assert not index._roots


def test_a_deep_trie_is_no_recursion():
    """Diverging prompts, each of which branches off the previous one."""
    index, path = AnyPositionIndex(8), list(range(8))
    for number in range(1200):
        path = [*path, *range(10 * number + 1000, 10 * number + 1004)]
        index.add("x", [*path, 7])
        index.add("x", [*path, 8, 8, 8, 8])
    first = next(iter(index._segments.values()))
    while first.parent is not None and first.parent.parent is not None:
        first = first.parent
    (span, *_) = find_spans(index, "x", [5, *path, 6])
    assert span.length >= len(path) - 4
    index.forget(first, 0)
    assert len(index) == 0


def test_namespaces_with_equal_hashes_stay_apart():
    index = AnyPositionIndex(min_span=MIN_SPAN)
    one, other, tokens = -1, -2, list(range(64))
    assert hash(one) == hash(other)
    index.add(one, tokens)
    assert find_spans(index, other, tokens) == []
    index.add(other, tokens[::-1])
    index.add(other, tokens)
    assert len(index) == 3 * 64
    (span,) = find_spans(index, one, tokens)
    assert span.segment.namespace == one
    (span,) = find_spans(index, other, tokens)
    assert span.segment.namespace == other


def test_namespaces_leave_nothing_when_their_donors_go():
    index = AnyPositionIndex(32, capacity=10_000)
    generator = np.random.default_rng(0)
    for user in range(2000):
        index.add(f"user-{user}", generator.integers(0, 49000, 64, dtype=np.int32))
    assert len(index._roots) == len(index._segments) <= 10_000 // 64 + 1
