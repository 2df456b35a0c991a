"""A prompt's search: what it costs, when it is repeated, and what a client can learn from it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.search import PromptSearch, find_spans
from a3_sglang.matching.segment import Segment
from helpers.spans import places

# ---- cost of a search, in counted steps


def tokens(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.integers(5, 49000, count, dtype=np.int32)


def cost(index: AnyPositionIndex, prompt: np.ndarray) -> int:
    before = index.steps
    find_spans(index, "x", prompt)
    return index.steps - before


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("length", [2000, 32_000])
def test_repeated_tokens_cost_little_more_than_random_ones(alive, length):
    generator = np.random.default_rng(length)
    index = AnyPositionIndex(32, capacity=400_000)
    index.add("x", tokens(generator, length))
    repeated = np.full(length, 7, np.int32)
    for _ in range(20):
        index.add("x", np.concatenate([tokens(generator, 3), repeated]))
    index.add("x", np.concatenate([tokens(generator, 3), repeated[:20]]))
    if not alive:
        for segment in list(index._segments.values()):
            if segment.number in index._segments and (segment.tokens == 7).sum() > 10:
                index.drop(segment, 0)
    prompt = np.concatenate([tokens(generator, 2), repeated, tokens(generator, 40)])
    assert cost(index, prompt) <= 3 * cost(index, tokens(generator, len(prompt)))
    found = sum(span.length for span in find_spans(index, "x", prompt))
    assert found > 0.9 * length if alive else found == 0


def test_popular_documents_cost_little_more_than_others():
    generator = np.random.default_rng(1)
    documents = [tokens(generator, 500) for _ in range(12)]
    costs = []
    for copies in (1, 16, 64):
        index = AnyPositionIndex(32)
        for _ in range(copies):
            index.add("x", np.concatenate([tokens(generator, 50), *(documents[i] for i in generator.permutation(12))]))
        prompt = np.concatenate([tokens(generator, 30), *(documents[i] for i in generator.permutation(12))])
        assert sum(span.length for span in find_spans(index, "x", prompt)) > 0.9 * len(prompt)
        costs.append(cost(index, prompt))
    assert max(costs) <= 1.2 * costs[0]


def test_short_matches_everywhere_stay_within_the_budget():
    """Every second block of the prompt is in some donor, but never two consecutive ones."""
    generator = np.random.default_rng(2)
    index = AnyPositionIndex(32)
    blocks = [tokens(generator, 16) for _ in range(200)]
    for block in blocks:
        for _ in range(20):
            index.add("x", np.concatenate([tokens(generator, 16), block, tokens(generator, 16)]))
    prompt = np.concatenate([part for block in blocks for part in (block, tokens(generator, 8), block)])
    assert cost(index, prompt) <= 3 * len(prompt)


@given(st.integers(0, 40), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_a_living_donor_is_found_past_stale_ones(stale, copies):
    generator = np.random.default_rng(stale)
    index, document = AnyPositionIndex(32), tokens(generator, 100)
    first = np.concatenate([tokens(generator, 16), document])
    index.add("x", first)
    for _ in range(stale):
        index.add("x", np.concatenate([tokens(generator, 16), document]))
    asked: list[Segment] = []

    def holds(segment: Segment) -> int:
        asked.append(segment)
        return segment.end if segment.tokens[0] == first[0] else 0

    prompt = np.concatenate([part for _ in range(copies) for part in (tokens(generator, 9), document)])
    spans = find_spans(index, "x", prompt, cached_length=holds)
    assert places(spans) == [(9 + 109 * i, 100) for i in range(copies)]
    assert len(asked) == len(set(asked))


# ---- one prompt, searched repeatedly


def test_a_prompt_is_searched_again_only_if_something_relevant_changed():
    generator = np.random.default_rng(3)
    index = AnyPositionIndex(32)
    one, two, other = (tokens(generator, 160) for _ in range(3))
    index.add("x", np.concatenate([tokens(generator, 16), one]))
    prompt = np.concatenate([tokens(generator, 7), one, two, tokens(generator, 40)])
    search = PromptSearch(index, "x", prompt)
    assert places(search.spans(0)) == [(7, 160)]
    for _ in range(5):
        index.add("x", tokens(generator, 300))
        assert places(search.spans(0)) == [(7, 160)]
    # Another donor of what is covered already, and the other text in another namespace.
    index.add("x", np.concatenate([tokens(generator, 32), one]))
    index.add("y", np.concatenate([tokens(generator, 32), two]))
    assert places(search.spans(0)) == [(7, 160)]
    assert search.searches == 1
    index.add("x", np.concatenate([tokens(generator, 16), two, other]))
    assert places(search.spans(0)) == [(7, 160), (167, 160)]
    assert search.searches == 2
    # A longer prefix shortens the spans.
    assert places(search.spans(27)) == [(27, 140), (167, 160)]
    assert search.spans(27)[0].offset in (16 + 20, 32 + 20)
    assert places(search.spans(150)) == [(167, 160)]
    assert search.searches == 2
    # The donor of a span is forgotten.
    index.forget(search.spans(0)[1].segment, 16)
    assert places(search.spans(0)) == [(7, 160)]
    assert search.searches == 3
    index.clear()
    assert search.spans(0) == []
    assert search.searches == 4


# ---- what a client can learn


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 7))
def test_guessing_one_token_at_a_time_finds_nothing(seed, known_after):
    """The client knows the text around a secret, but not the secret's position in the victim's prompt."""
    chooser = random.Random(seed)
    index = AnyPositionIndex(32)
    draw = lambda count: [chooser.randrange(5, 49000) for _ in range(count)]  # noqa: E731
    form, after, digits = draw(60), draw(known_after), list(range(50_000, 50_010))
    secret = [chooser.choice(digits) for _ in range(6)]
    before = chooser.randrange(100, 400)
    index.add("x", [*draw(before), *form, *secret, *after, *draw(300)])

    def found(guess: list[int]) -> int:
        return sum(span.length for span in find_spans(index, "x", [*draw(7), *form[-45:], *guess, *draw(60)]))

    # Only a guess that completes a block of the victim's shows, and it reveals nothing about single tokens in it.
    boundary = -(before + 60) % 16
    seen = [found([*secret[:right], *(digit - 50 for digit in secret[right:])]) for right in range(7)]
    assert {right for right in range(1, 7) if seen[right] != seen[right - 1]} <= {boundary}
