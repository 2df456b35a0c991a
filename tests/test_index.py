"""The any-position index against a brute-force oracle."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_sglang.cache.index import AnyPositionIndex

MIN_SPAN = 8


def oracle(donors: list[tuple[str, list[int]]], namespace: str, prompt: list[int], start: int, block: int, unit: int, shortest: int):
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
                    piece
                    for a, b in pieces
                    for piece in ((a, min(b, tp)), (max(a, tp + tn), b))
                    if piece[1] > piece[0]
                ]
            free.update((a, b - a) for a, b in pieces)
        best = min(((-n, p) for p, n in free if n >= shortest), default=None)
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


@settings(max_examples=400, deadline=None)
@given(worlds(), st.sampled_from([1, 3, 16]))
def test_finds_what_brute_force_finds(world, page_size):
    steps, prompt, namespace, start = world
    index = AnyPositionIndex(min_span=MIN_SPAN, candidates=10_000, page_size=page_size)
    unit = math.lcm(index.block, page_size)
    donors: list[tuple[str, list[int]]] = []
    for kind, a, b in steps:
        if kind == "add":
            path = b[: len(b) // page_size * page_size]
            index.add(a, path)
            donors.append((a, path))
        elif donors:
            victim_space, victim = donors[a % len(donors)]
            keep = min(b, len(victim)) // page_size * page_size
            # A tree that lost victim[:keep+1] lost every path that runs through it.
            gone = victim[:keep + page_size]
            runs = [
                r for r in index.matches(victim_space, np.asarray(victim, np.int32)) if r.start == 0 and r.offset == 0
            ] if len(victim) >= index.block else []
            for r in runs:
                shared = 0
                path = r.path().tolist()
                while shared < min(len(path), keep) and path[shared] == victim[shared]:
                    shared += 1
                if len(path) > shared and path[: len(gone)] == gone[: len(path)]:
                    index.forget(r.segment, shared)
            donors = [
                (n, d[:keep] if n == victim_space and len(gone) > keep and d[: len(gone)] == gone else d) for n, d in donors
            ]
    found = index.find(namespace, prompt, start) if len(prompt) >= index.block else []
    for run in found:
        assert prompt[run.start : run.end] == run.path()[run.offset :].tolist()
        assert any(n == namespace and d[: len(run.path())] == run.path().tolist() for n, d in donors)
    expected = oracle(donors, namespace, prompt, start, index.block, unit, MIN_SPAN)
    assert [(r.start, r.length) for r in found] == expected
