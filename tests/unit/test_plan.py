"""Plans: partition of the prompt, steps of a chunked prefill, the question."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.plan import (
    LONGEST_QUESTION,
    MIN_TAIL,
    QUESTION_TOKENS,
    SHORTEST_QUESTION,
    Plan,
    first_step,
    make_plan,
    question_ranges,
)
from a3_sglang.matching.search import find_spans
from a3_sglang.matching.span import Span

MIN_SPAN = 8


@st.composite
def prompts(draw: st.DrawFn):
    """Donors, and a prompt that consists of an exact prefix, pieces of donors, and tokens of no donor."""
    page_size = draw(st.sampled_from([1, 1, 4, 16]))
    donors, fresh = [], 10_000
    for number in range(draw(st.integers(1, 3))):
        length = draw(st.integers(MIN_SPAN, 150))
        donors.append(list(range(1000 * number, 1000 * number + length)))
    prefix = page_size * draw(st.integers(0, 40 // page_size))
    prompt = list(range(fresh, fresh + prefix))
    fresh += prefix
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            donor = draw(st.sampled_from(donors))
            begin = draw(st.integers(0, len(donor) - 1))
            prompt += donor[begin : begin + draw(st.integers(1, 150))]
        else:
            count = draw(st.integers(0, 60))
            prompt += range(fresh, fresh + count)
            fresh += count
    prompt += range(fresh, fresh + draw(st.integers(0, 80)))
    limit = draw(st.integers(0, len(prompt)))
    return donors, prompt, prefix, draw(st.sampled_from([len(prompt), max(len(prompt) - 1, 0), limit])), page_size


@settings(max_examples=400, deadline=None)
@given(prompts())
def test_a_plan_partitions_the_prompt(case):
    donors, prompt, prefix, limit, page_size = case
    index = AnyPositionIndex(MIN_SPAN, page_size=page_size)
    for donor in donors:
        index.add("space", donor[: len(donor) // page_size * page_size])
    spans = find_spans(index, "space", prompt[:limit], prefix) if limit else []
    plan = make_plan(spans, prefix, len(prompt), limit, page_size)
    furthest = min(limit, len(prompt) - MIN_TAIL)
    furthest -= furthest % page_size
    if plan is None:
        assert all(span.start >= furthest for span in spans)
        return

    # The end.
    assert plan.prefix == prefix < plan.end <= furthest
    assert plan.end % page_size == 0
    assert len(prompt) - plan.end >= MIN_TAIL

    # Spans and gaps follow each other without a hole from the prefix to the end.
    gaps = list(plan.gap_ranges())
    pieces = sorted([(span.start, span.end) for span in plan.spans] + gaps)
    assert all(begin < end for begin, end in pieces)
    assert [begin for begin, _ in pieces] + [plan.end] == [prefix] + [end for _, end in pieces]
    assert plan.gap == sum(end - begin for begin, end in gaps)
    assert plan.reused == sum(end - begin for begin, end in pieces) - plan.gap
    tail = len(prompt) - plan.end
    assert plan.prefix + plan.reused + plan.gap + tail == len(prompt)

    # The tail begins after the last span, at the next page.
    assert plan.end - plan.spans[-1].end < page_size

    # Spans are what the index found, cut at the end only.
    for span, found in zip(plan.spans, spans, strict=False):
        assert span.segment is found.segment
        assert (span.start, span.offset) == (found.start, found.offset)
        assert span.end == min(found.end, plan.end)
        held = span.segment.path(span.donor_end, span.offset)
        assert np.array_equal(held, prompt[span.start : span.end])
    # No span that fits is missing.
    assert all(span.start >= furthest for span in spans[len(plan.spans) :])


def test_no_spans_no_plan():
    assert make_plan([], 0, 100, 100, 1) is None
    assert make_plan([], 16, 10, 10, 16) is None


def test_a_span_in_the_last_tokens_is_left_to_the_tail():
    index = AnyPositionIndex(MIN_SPAN)
    donor = list(range(100))
    index.add("space", donor)
    prompt = [500, *donor[: MIN_TAIL - 4]]
    spans = find_spans(index, "space", prompt)
    assert [(span.start, span.length) for span in spans] == [(1, MIN_TAIL - 4)]
    assert make_plan(spans, 0, len(prompt), len(prompt), 1) is None


def test_a_cut_between_two_spans_ends_the_plan_at_the_first():
    index = AnyPositionIndex(MIN_SPAN)
    donor = list(range(100))
    index.add("space", donor)
    prompt = [500, *donor[10:30], *range(600, 640), *donor[50:70], *range(700, 710)]
    plan = make_plan(find_spans(index, "space", prompt), 0, len(prompt), len(prompt), 1)
    assert plan is not None
    assert [(span.start, span.end) for span in plan.spans] == [(3, 19)]
    assert plan.end == 19
    assert list(plan.gap_ranges()) == [(0, 3)]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(MIN_SPAN, 80)), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.15, 0.6, 1.0]),
    st.integers(1, 300),
    st.sampled_from([1, 16]),
)
def test_steps_of_a_plan_stay_within_their_rows(pieces, ratio, rows, page_size):
    at, spans = 0, []
    for gap, length in pieces:
        spans.append(Span(at + gap, length, None, 0))
        at += gap + length
    plan = Plan(0, at + -at % page_size, tuple(spans))
    first, stop = first_step(plan, ratio, rows, page_size, MIN_SPAN)
    if first == plan:
        assert stop is None
        assert plan.rows(ratio) <= rows + page_size - 1  # Up to a page after the last span.
        return
    # Up to its end, the first step has all of every span, and nothing after it.
    end = 0
    if first is not None:
        end = first.end
        assert end % page_size == 0
        assert first.rows(ratio) <= rows
        assert first.reused > 0  # At ratio 0 reuse costs no rows.
        for span, whole in zip(first.spans, plan.spans, strict=False):
            assert (span.start, span.end) == (whole.start, min(whole.end, end))
    left = [max(span.start, end) for span in plan.spans if span.end - max(span.start, end) >= MIN_SPAN]
    assert stop == (left[0] if left else None)
    # It could have reused less than another page.
    reused = {at for span in spans for at in range(span.start, span.end)}
    computed, reach = 0.0, 0
    for at in range(plan.end):
        computed += ratio if at in reused else 1
        if at in reused and computed <= rows + 1e-6:
            reach = at + 1
    assert not reused & set(range(end, reach // page_size * page_size))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(MIN_SPAN, 80)), min_size=1, max_size=5),
    st.integers(0, 30),
    st.integers(0, 40),
    st.floats(0, 1),
)
def test_gap_tokens_at_the_edges_of_spans_count_towards_the_ratio(pieces, prefix, padding, ratio):
    """Tokens left out by matching in blocks are computed in any case; the selector gets the rest of the budget."""
    block, at, spans = 16, prefix, []
    for gap, length in pieces:
        at += gap
        spans.append(Span(at, length, None, 0))
        at += length
    plan = Plan(prefix, at + padding, tuple(spans))
    beside = set()
    for start, end in plan.gap_ranges():
        for span in spans:
            beside |= set(range(max(start, span.start - block + 1), min(end, span.start)))
            beside |= set(range(max(start, span.end), min(end, span.end + block - 1)))
    assert plan.gap_at_edges(block) == len(beside)
    left = plan.ratio(ratio, block) * plan.reused
    wanted = ratio * (plan.reused + len(beside)) - len(beside)
    assert left == pytest.approx(max(wanted, ratio * plan.reused / 2))
    assert plan.ratio(1.0, block) == 1.0
    assert plan.ratio(0.0, block) == 0.0


def _planned(pieces: list[tuple[int, int]]) -> Plan:
    """A plan with a prefix of 10 tokens, then a gap and a span per pair of lengths."""
    at, spans = 10, []
    for gap, length in pieces:
        spans.append(Span(at + gap, length, None, 0))  # type: ignore[arg-type]
        at += gap + length
    return Plan(10, at, tuple(spans))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(MIN_SPAN, 80)), min_size=1, max_size=8),
    st.integers(MIN_TAIL, 700),
)
def test_the_question_is_the_tail_and_short_gaps(pieces, tail):
    plan = _planned(pieces)
    prompt = plan.end + tail
    ranges = question_ranges(plan, prompt)
    assert all(start <= end for start, end in ranges)
    assert all(one[1] <= other[0] for one, other in pairwise(ranges))
    asked = [at for start, end in ranges for at in range(start, end)]
    asking = [(a, b) for a, b in plan.gap_ranges() if SHORTEST_QUESTION <= b - a <= LONGEST_QUESTION]
    all_of_it = [at for start, end in [*asking, (plan.end, prompt)] for at in range(start, end)]
    assert set(asked) <= set(all_of_it)
    assert asked == all_of_it or len(asked) == QUESTION_TOKENS
    assert asked[-1] == prompt - 1
    for start, _ in asking:  # At least the beginning of each gap.
        assert start in asked
    assert tail > LONGEST_QUESTION or plan.end in asked


def test_a_question_before_the_passages_and_instructions_after_it():
    first = _planned([(25, 400), (3, 400)])
    end = first.end
    assert question_ranges(first, end + 32) == [(10, 35), (end, end + 16), (end + 16, end + 32)]
    last = _planned([(0, 400)])
    tail = [(last.end, last.end + 32), (last.end + 150, last.end + 182)]
    assert question_ranges(last, last.end + 182) == tail
    assert question_ranges(last, last.end + 182, (300, 340)) == [(300, 320), (320, 340)]
