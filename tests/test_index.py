"""The any-position index against a brute-force oracle."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from a3_sglang.cache.index import AnyPositionIndex

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
        hashed = len(path) // unit * unit
        for o in range(len(path)):
            for p in range(start, len(prompt)):
                if prompt[p] != path[o] or (p > start and o > 0 and prompt[p - 1] == path[o - 1]):
                    continue
                n = 0
                while p + n < len(prompt) and o + n < len(path) and prompt[p + n] == path[o + n]:
                    n += 1
                if -(-o // block) * block + block <= min(o + n, hashed):
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
    return max((shared(path, donor) for name, donor in donors if name == namespace), default=0)


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def evicted(donors: list[Donor], which: int, keep: int, page_size: int) -> list[Donor]:
    """The donors after the tree lost the page behind ``keep`` of one, and so every path that runs through it."""
    space, victim = donors[which % len(donors)]
    keep = min(keep, len(victim)) // page_size * page_size
    gone = victim[: keep + page_size]
    return [(name, path[:keep] if (name, path[: len(gone)]) == (space, gone) else path) for name, path in donors]


@settings(max_examples=300, deadline=None)
@given(worlds(), st.sampled_from([1, 3, 16]))
def test_finds_what_brute_force_finds(world, page_size):
    """The index is told of every eviction at once, so that it knows exactly what the tree holds."""
    steps, prompt, namespace, start = world
    index = AnyPositionIndex(min_span=MIN_SPAN, candidates=10_000, page_size=page_size)
    donors: list[Donor] = []
    for kind, a, b in steps:
        if kind == "add":
            path = b[: len(b) // page_size * page_size]
            index.add(a, path)
            donors.append((a, path))
        elif donors:
            donors = evicted(donors, a, b, page_size)
            for segment in list(index._segments.values()):
                kept = held(donors, segment.namespace, segment.path(segment.end).tolist())
                if segment.number in index._segments and kept < segment.end:
                    index.forget(segment, kept)
    found = index.find(namespace, prompt, start)
    for run in found:
        path = run.path().tolist()
        assert prompt[run.start : run.end] == path[run.offset :]
        assert held(donors, namespace, path) == len(path)
    unit = math.lcm(index.block, page_size)
    expected = oracle(donors, namespace, prompt, start, index.block, unit)
    assert [(run.start, run.length) for run in found] == expected
    assert index.known_prefix(namespace, prompt) == held(donors, namespace, prompt) // unit * unit


@settings(max_examples=150, deadline=None)
@given(worlds(), st.sampled_from([1, 3, 16]))
def test_evictions_are_noticed_on_use(world, page_size):
    """As the backend does it: what the tree no longer holds is forgotten when found, then looked up again."""
    steps, prompt, namespace, start = world
    index = AnyPositionIndex(min_span=MIN_SPAN, candidates=10_000, page_size=page_size)
    donors: list[Donor] = []
    for kind, a, b in steps:
        if kind == "add":
            path = b[: len(b) // page_size * page_size]
            index.add(a, path)
            donors.append((a, path))
        elif donors:
            donors = evicted(donors, a, b, page_size)
    while True:
        found = index.find(namespace, prompt, start)
        held_of = {run: held(donors, namespace, run.path().tolist()) for run in found}
        gone = [run for run in found if held_of[run] < run.offset + run.length]
        if not gone:
            break
        version = index.version
        for run in gone:
            index.forget(run.segment, held_of[run])
        assert index.version > version, "nothing was forgotten, so the same runs would come again"
    # It may know a little more of the tree than whole units: what was cut is forgotten by use only.
    expected = oracle(donors, namespace, prompt, start, index.block, math.lcm(index.block, page_size))
    longest = max((length for _, length in expected), default=0)
    assert max((run.length for run in found), default=0) >= longest


@given(st.integers(1, 5), st.integers(MIN_SPAN, 40))
def test_equal_runs_at_one_place_are_no_error(period, length):
    """A repetitive donor holds the same tokens at many offsets; runs of equal length and place compete."""
    index = AnyPositionIndex(min_span=MIN_SPAN)
    index.add("x", list(range(period)) * 50)
    again = (list(range(period)) * 40)[:length]
    assert [(run.start, run.length) for run in index.find("x", [*again, 99, *again])] == [
        (0, length),
        (length + 1, length),
    ]


@given(st.integers(MIN_SPAN, 30), st.integers(MIN_SPAN, 30))
def test_equal_remains_of_trimmed_runs_are_no_error(left, right):
    """The run through the middle trims many others to the same remains."""
    index = AnyPositionIndex(min_span=MIN_SPAN)
    index.add("x", [1] * 32 + [2] * 32)
    found = index.find("x", [1] * (32 + left) + [2] * (32 + right))
    assert [(run.start, run.length) for run in found] == [(0, left), (left, 64), (left + 64, right)]


@given(st.integers(MIN_SPAN, 80), st.integers(0, 5), st.sampled_from([1, 3, 16]))
def test_a_donor_is_found_to_its_last_page(length, place, page_size):
    """Tokens behind the last block have no hash of their own; donors may differ in nothing else."""
    index = AnyPositionIndex(min_span=MIN_SPAN, page_size=page_size)
    donor = list(range(length))
    index.add("x", donor)
    index.add("x", [*donor[:-1], 999])
    held = length // page_size * page_size
    for last in (length - 1, 999):
        prompt = [*range(900, 900 + place), *donor[:-1], last, 777]
        (run,) = index.find("x", prompt) or [None]
        if run is None:
            # The whole blocks of whole pages at its beginning hold no run that must be found.
            assert held < math.lcm(index.block, page_size)
        else:
            assert (run.start, run.length) == (place, held)
            assert run.path(page_size).tolist() == prompt[place : place + held]


@given(st.integers(MIN_SPAN, 40), st.integers(1, 20), st.sampled_from([0, 1]))
def test_a_run_goes_on_into_the_donor_that_continues_it(common, more, which):
    """Donors that part share their first segment; a continuation shorter than a block has no hash of its own."""
    index = AnyPositionIndex(min_span=MIN_SPAN)
    donors = [[*range(common), *range(100 * number, 100 * number + 40)] for number in (1, 2)]
    for donor in donors:
        index.add("x", donor)
    prompt = [*donors[which][: common + more], *range(900, 920)]
    (run,) = index.find("x", prompt)
    assert (run.start, run.length) == (0, common + more)
    assert run.path().tolist() == prompt[: common + more]


def test_namespaces_with_equal_hashes_stay_apart():
    index = AnyPositionIndex(min_span=MIN_SPAN)
    one, other, tokens = -1, -2, list(range(64))
    assert hash(one) == hash(other)
    index.add(one, tokens)
    assert index.find(other, tokens) == []
    index.add(other, tokens[::-1])
    index.add(other, tokens)
    assert len(index) == 3 * 64
    (run,) = index.find(one, tokens)
    assert run.segment.namespace == one
    (run,) = index.find(other, tokens)
    assert run.segment.namespace == other
