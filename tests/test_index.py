"""The any-position index against a brute-force oracle."""

from __future__ import annotations

import math
from os.path import commonprefix

from hypothesis import given, settings
from hypothesis import strategies as st

from a3_sglang.cache.index import AnyPositionIndex, Run

MIN_SPAN = 8


Donor = tuple[str, list[int]]


def oracle(
    donors: list[Donor], namespace: str, prompt: list[int], start: int, block: int, unit: int
) -> list[tuple[int, int]]:
    """Longest-first cover by every maximal run that holds a whole, aligned block of a donor; (start, length) pairs."""
    runs = set()
    for name, path in donors:
        if name != namespace:
            continue
        path = path[: len(path) // unit * unit]
        for o in range(len(path)):
            for p in range(start, len(prompt)):
                if prompt[p] != path[o] or (p > start and o > 0 and prompt[p - 1] == path[o - 1]):
                    continue
                n = 0
                while p + n < len(prompt) and o + n < len(path) and prompt[p + n] == path[o + n]:
                    n += 1
                if -(-o // block) * block + block <= o + n:
                    runs.add((p, n))
    taken: list[tuple[int, int]] = []
    while True:
        free = set()
        for p, n in runs:
            pieces = [(p, p + n)]
            for tp, tn in taken:
                pieces = [
                    piece for a, b in pieces for piece in ((a, min(b, tp)), (max(a, tp + tn), b)) if piece[1] > piece[0]
                ]
            free.update((a, b - a) for a, b in pieces)
        best = min(((-n, p) for p, n in free if n >= MIN_SPAN), default=None)
        if best is None:
            return sorted(taken)
        taken.append((best[1], -best[0]))


@st.composite
def worlds(draw):
    """Donors glued from shared pieces over a small alphabet, evictions, and prompts glued from the same pieces."""
    alphabet = draw(st.sampled_from([2, 5, 50]))
    token = st.integers(0, alphabet)
    pieces = draw(st.lists(st.lists(token, min_size=1, max_size=30), min_size=2, max_size=6))
    text = st.lists(st.sampled_from(range(len(pieces))), min_size=1, max_size=5).map(
        lambda which: [t for i in which for t in pieces[i]]
    )
    steps = draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("add"), st.sampled_from("xy"), text),
                st.tuples(st.just("evict"), st.integers(0, 100), st.integers(0, 120)),
            ),
            min_size=1,
            max_size=8,
        )
    )
    return steps, draw(text), draw(st.sampled_from("xy")), draw(st.integers(0, 10))


def held(donors: list[Donor], namespace: str, path: list[int]) -> int:
    """How many leading tokens of a path the tree has."""
    return max((len(commonprefix([path, donor])) for name, donor in donors if name == namespace), default=0)


def find_held(index: AnyPositionIndex, donors: list[Donor], namespace: str, prompt: list[int], start: int) -> list[Run]:
    """Look up as the backend does: what the tree no longer holds is forgotten, then again."""
    while True:
        runs = index.find(namespace, prompt, start)
        gone = [run for run in runs if held(donors, namespace, run.path().tolist()) < run.offset + run.length]
        if not gone:
            return runs
        version = index.version
        for run in gone:
            index.forget(run.segment, held(donors, namespace, run.path().tolist()))
        assert index.version > version, "nothing was forgotten, so the same runs would come again"


@settings(max_examples=400, deadline=None)
@given(worlds(), st.sampled_from([1, 3, 16]))
def test_finds_what_brute_force_finds(world, page_size):
    steps, prompt, namespace, start = world
    index = AnyPositionIndex(min_span=MIN_SPAN, candidates=10_000, page_size=page_size)
    donors: list[Donor] = []
    for kind, a, b in steps:
        if kind == "add":
            path = b[: len(b) // page_size * page_size]
            index.add(a, path)
            donors.append((a, path))
        elif donors:
            space, victim = donors[a % len(donors)]
            keep = min(b, len(victim)) // page_size * page_size
            # A tree without victim's page behind keep lost every path that runs through it.
            gone = victim[: keep + page_size]
            donors = [
                (name, path[:keep] if (name, path[: len(gone)]) == (space, gone) else path) for name, path in donors
            ]
    found = find_held(index, donors, namespace, prompt, start)
    for run in found:
        assert prompt[run.start : run.end] == run.path()[run.offset :].tolist()
    expected = oracle(donors, namespace, prompt, start, index.block, math.lcm(index.block, page_size))
    assert [(run.start, run.length) for run in found] == expected


@given(st.integers(1, 5), st.integers(MIN_SPAN, 40))
def test_equal_runs_at_one_place_are_no_error(period, length):
    """A repetitive donor holds the same tokens at many offsets; runs of equal length and place compete."""
    index = AnyPositionIndex(min_span=MIN_SPAN)
    index.add("x", list(range(period)) * 20)
    prompt = [*(list(range(period)) * 40)[:length], 99, *(list(range(period)) * 40)[:length]]
    assert [(run.start, run.length) for run in index.find("x", prompt)] == [(0, length), (length + 1, length)]
