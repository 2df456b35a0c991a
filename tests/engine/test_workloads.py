"""Typical workloads in computed tokens: a3 on the real engine against stock SGLang's prefix cache on the same prompts.

Stock's count is that of a prefix cache that never evicts, so it is the least that stock could compute.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from a3_sglang.client import flush
from helpers.traffic import Traffic

pytestmark = [pytest.mark.engine, pytest.mark.core]

OPTIONS = {"A3_MIN_SAVING": "0.3333", "A3_OVERHEAD": "0"}


class Counted:
    """Sends requests to the engine, and counts the tokens that a3 and stock SGLang compute."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.paths: list[list[int]] = []
        self.a3: list[int] = []
        self.stock: list[int] = []
        self.reasons: list[str | None] = []

    def ask(self, ids: list[int], tokens: int = 4) -> list[int]:
        out = self.traffic.ask(ids, tokens=tokens)
        known = max((common(ids, path) for path in self.paths), default=0)
        self.stock.append(len(ids) - min(known, len(ids) - 1))
        self.a3.append(len(ids) - out["meta_info"]["cached_tokens"])
        self.reasons.append(out["meta_info"]["a3"]["reason"])
        answer: list[int] = out["output_ids"]
        # The last token of an answer has no KV, except in releases before 0.5.21.
        self.paths.append([*ids, *answer[:-1]])
        return answer

    def never_more(self, first: int) -> bool:
        """Whether no request from number ``first`` on computed more than stock."""
        return all(mine <= theirs for mine, theirs in zip(self.a3[first:], self.stock[first:], strict=True))


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.fixture
def counted(traffic: Traffic) -> Counted:
    flush(traffic.running)
    traffic.renew()
    return Counted(traffic)


@pytest.fixture
def known(counted: Counted) -> Callable[[list[int]], list[int]]:
    """Makes the beginning of a prompt over cached documents."""
    counted.ask(counted.traffic.prompt(list(range(8))))
    return lambda order: counted.traffic.prompt(order, 0)


def test_many_questions_over_one_context(counted, known):
    context = known([5, 2, 7, 0, 3])
    for _ in range(12):
        counted.ask([*context, *counted.traffic.tokens(30)])
    assert counted.a3[1] < 0.6 * counted.stock[1]
    assert counted.never_more(2)


def test_a_chat_over_known_documents(counted, known):
    ids = [*known([5, 2, 7, 0, 3]), *counted.traffic.tokens(30)]
    for _ in range(6):
        ids = [*ids, *counted.ask(ids), *counted.traffic.tokens(30)]
    assert counted.a3[1] < 0.6 * counted.stock[1]
    assert counted.never_more(2)


def test_a_chat_over_a_new_document_after_a_shared_text(counted):
    """The shared text alone is not worth a fusion: the document is computed in full once, and is exact."""
    traffic = counted.traffic
    shared = traffic.tokens(150)
    counted.ask([*traffic.tokens(8), *shared, *traffic.tokens(30)])
    ids = [*traffic.tokens(8), *shared, *traffic.tokens(900), *traffic.tokens(30)]
    for _ in range(4):
        ids = [*ids, *counted.ask(ids), *traffic.tokens(30)]
    assert counted.never_more(0)


def test_retries(counted, known):
    ids = [*known([6, 1, 4]), *counted.traffic.tokens(30)]
    for _ in range(4):
        counted.ask(ids)
    assert counted.a3[2:] == counted.stock[2:] == [1, 1, 1]


def test_nothing_to_reuse(counted):
    for _ in range(4):
        counted.ask(counted.traffic.tokens(700))
    assert counted.a3 == counted.stock


def test_new_documents_become_donors(counted):
    """Documents drawn by Zipf's law after a common text; a tenth of the corpus is replaced every ten prompts."""
    chooser, traffic = random.Random(3), counted.traffic
    shared, corpus = traffic.tokens(100), [traffic.tokens(150) for _ in range(24)]
    weights = [1 / (rank + 1) for rank in range(len(corpus))]
    for number in range(100):
        if number % 10 == 9:
            for place in chooser.sample(range(len(corpus)), 2):
                corpus[place] = traffic.tokens(150)
        chosen: list[int] = []
        while len(chosen) < 5:
            place = chooser.choices(range(len(corpus)), weights)[0]
            if place not in chosen:
                chosen.append(place)
        ids = [*traffic.tokens(6), *shared, *(t for place in chosen for t in corpus[place]), *traffic.tokens(30)]
        counted.ask(ids, tokens=1)
    assert all(mine <= theirs for mine, theirs in zip(counted.a3, counted.stock, strict=True))
    early, late = (sum(counted.a3[part]) / sum(counted.stock[part]) for part in (slice(20), slice(60, 100)))
    assert late < 0.45
    assert late < early
    assert "renews donors" in counted.reasons[30:]
