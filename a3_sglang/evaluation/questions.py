"""Questions over passages, and synthetic ones from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pydoc_data.topics import topics

from pydantic import BaseModel, ConfigDict, Field


class Passage(BaseModel):
    """One passage of a prompt."""

    model_config = ConfigDict(frozen=True)

    title: str = ""
    text: str = Field(min_length=1)


class Question(BaseModel):
    """A question with its passages and all answers that count as right.

    Attributes:
        ctxs: its passages.
        question: what is asked.
        answers: any of them is right.
        in_order: the passages are parts of one text, or ranked, and prompts keep their order.
    """

    model_config = ConfigDict(frozen=True)

    ctxs: tuple[Passage, ...] = Field(min_length=1)
    question: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(min_length=1)
    in_order: bool = False


# ---- synthetic tasks

_CITIES = (
    "Avila",
    "Bergen",
    "Cadiz",
    "Delft",
    "Evora",
    "Fargo",
    "Galway",
    "Hobart",
    "Izmir",
    "Jaipur",
    "Kyoto",
    "Lagos",
)
_THINGS = ("lantern", "anchor", "violin", "compass", "kettle", "marble", "saddle", "ribbon", "hammer", "feather")


def _filler(chooser: random.Random, passages: int) -> list[list[str]]:
    """Sentences of CPython's documentation, one list per passage."""
    names = sorted(name for name, text in topics.items() if len(text) > 1500)
    if passages > len(names):
        raise ValueError(
            f"synthetic questions have at most {len(names)} passages, not {passages}; ask for fewer or "
            "give a file of questions"
        )
    names = chooser.sample(names, passages)
    return [[s.strip() + "." for s in " ".join(topics[name].split()).split(". ") if len(s) > 20] for name in names]


def _plant(chooser: random.Random, passages: int, facts: list[str], sentences: int) -> tuple[Passage, ...]:
    """Filler with the facts in it, spread evenly over the passages."""
    texts = [text[:sentences] for text in _filler(chooser, passages)]
    places = chooser.sample(range(passages), passages)
    for i, fact in enumerate(facts):
        text = texts[places[i % passages]]
        text.insert(chooser.randrange(len(text) + 1), fact)
    return tuple(Passage(text=" ".join(text)) for text in texts)


def _fact(chooser: random.Random, passages: int, sentences: int) -> Question:
    """One number somewhere in the passages."""
    city, number = chooser.choice(_CITIES), str(chooser.randrange(10_000, 99_999))
    ctxs = _plant(chooser, passages, [f"The secret number of {city} is {number}."], sentences)
    return Question(ctxs=ctxs, question=f"What is the secret number of {city}?", answers=(number,))


def _facts(chooser: random.Random, passages: int, sentences: int) -> Question:
    """One number among many of the same kind, one per passage."""
    cities = chooser.sample(_CITIES, min(passages, len(_CITIES)))
    numbers = [str(chooser.randrange(10_000, 99_999)) for _ in cities]
    facts = [f"The secret number of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
    ctxs = _plant(chooser, passages, facts, sentences)
    asked = chooser.randrange(len(cities))
    return Question(ctxs=ctxs, question=f"What is the secret number of {cities[asked]}?", answers=(numbers[asked],))


def _tracking(chooser: random.Random, passages: int, sentences: int) -> Question:
    """A value handed from name to name across the passages, as in RULER's variable tracking (arXiv 2404.06654)."""
    names = chooser.sample(_THINGS, min(4, passages))
    number = str(chooser.randrange(10_000, 99_999))
    facts = [f"The value of {names[0]} is {number}."]
    facts += [f"The value of {b} is the same as the value of {a}." for a, b in pairwise(names)]
    ctxs = _plant(chooser, passages, facts, sentences)
    return Question(ctxs=ctxs, question=f"Which number is the value of {names[-1]}?", answers=(number,))


def _queries(chooser: random.Random, passages: int, sentences: int) -> Question:
    """Two numbers asked for at once, as in RULER's multi-query needles."""
    cities = chooser.sample(_CITIES, min(passages, len(_CITIES)))
    numbers = [str(chooser.randrange(10_000, 99_999)) for _ in cities]
    facts = [f"The secret number of {city} is {number}." for city, number in zip(cities, numbers, strict=True)]
    ctxs = _plant(chooser, passages, facts, sentences)
    asked = f"What are the secret numbers of {cities[0]} and of {cities[-1]}?"
    return Question(ctxs=ctxs, question=asked, answers=(f"{numbers[0]} and {numbers[-1]}",))


TASKS: dict[str, Callable[[random.Random, int, int], Question]] = {
    "fact": _fact,
    "facts": _facts,
    "tracking": _tracking,
    "queries": _queries,
}
"""Tasks that need no data: ``(random, passages, sentences per passage) -> question``."""


def make(task: str, count: int, passages: int, sentences: int, seed: int) -> list[Question]:
    """``count`` questions of a synthetic task; the same arguments give the same questions."""
    return [TASKS[task](random.Random(f"{task} {seed} {i}"), passages, sentences) for i in range(count)]
