"""Sends one prompt to a server, with a3 and with a full prefill, and collects what the page shows."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from a3_sglang.explain.client import Answer, Candidate, Client, ExplainError
from a3_sglang.explain.text import find, longest_prefix, pieces
from a3_sglang.reporting.report import PARTS

_SETTLE_SECONDS = 0.3
_BEGINNING = 80
"""Characters shown of a donor's beginning."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, its name, and the tokens that are sent."""

    name: str
    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Origin:
    """Origin of the KV of the prompt's tokens ``[start, end)``.

    Attributes:
        start, end: positions in the prompt.
        kind: "exact", "continued" or "reused".
        position: of the first token in the text that the KV was computed for.
        approximate: whether that KV itself was fused.
        donor: name of the given donor that has these tokens there; None: another prompt of the server.
        beginning: the donor's first words.
        tokens: length of the donor.
    """

    start: int
    end: int
    kind: str
    position: int
    approximate: bool = False
    donor: str | None = None
    beginning: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate for the next token, as text, and whether it was chosen."""

    text: str
    logprob: float
    taken: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer after one kind of prefill.

    Attributes:
        pieces: text of each token of the answer.
        times: milliseconds to the first token of every run that counts.
        ttft: median of ``times``.
    """

    pieces: list[str]
    times: list[float]
    ttft: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that the page shows.

    Attributes:
        name: of the prompt.
        model: its name or folder.
        options: of the request.
        pieces: text of each token of the prompt.
        report: of a3, without its detail.
        runs: ``(part, start, end)`` for the whole prompt.
        relevance: of each token; None: not measured.
        origins: of all tokens that were not computed for this prompt, in order.
        stages: milliseconds of each stage of the fusion.
        a3, full: both answers.
        parted: index of the first token in which the answers differ; None: they are equal.
        candidates: the most likely tokens at that index with a3 and with a full prefill, best first.
    """

    name: str
    model: str
    options: dict[str, Any]
    pieces: list[str]
    report: dict[str, Any]
    runs: list[tuple[str, int, int]]
    relevance: list[float | None]
    origins: list[Origin]
    stages: dict[str, float]
    a3: Answered
    full: Answered
    parted: int | None
    candidates: tuple[list[Choice], list[Choice]] | None


def collect(
    client: Client,
    tokenizer: Any,
    model: str,
    prompt: Prompt,
    donors: Sequence[Prompt],
    options: dict[str, Any],
    *,
    tokens: int = 48,
    top: int = 8,
    repeats: int = 3,
    extra_key: str | None = None,
    step: Callable[[], None] = lambda: None,
) -> Explanation:
    """Send the donors, then the prompt with a3 and with a full prefill.

    Each full prefill goes into a new namespace, in which nothing is cached. Runs with a3 count as long as they reuse
    what the first one reused.

    Args:
        client: of the server.
        tokenizer: of its model.
        model: name on the page.
        prompt: the prompt to explain.
        donors: prompts to send first, in this order.
        options: of the prompt's request, see :class:`a3_sglang.config.RequestOptions`.
        tokens: most tokens of an answer.
        top: number of likely tokens to show at the first difference of the answers.
        repeats: measured runs of each kind, besides the first.
        extra_key: namespace of donors and prompt.
        step: called after each of ``2 * (1 + repeats)`` requests and each donor.

    Raises:
        ExplainError: the server refuses, fails, or reports nothing.
    """
    ids = prompt.ids
    # If the prompt may continue fused KV, its donors may be fused, too.
    asked: bool | dict[str, Any] = True if options.get("keep", True) else {"donor": True}
    for donor in donors:
        client.ask(donor.ids, asked, extra_key=extra_key)
        step()

    def full(**more: Any) -> Answer:
        return client.ask(ids, False, extra_key=f"{extra_key or ''}a3-explain-{uuid.uuid4()}", **more)

    # The first request of each kind warms up and does not count as a run.
    plain = full(tokens=tokens, top=top)
    step()
    first = client.ask(ids, options | {"explain": True}, tokens=tokens, top=top, extra_key=extra_key)
    report, detail = _split(first)
    step()
    a3_times, full_times, same = [], [], True
    for _ in range(repeats):
        time.sleep(_SETTLE_SECONDS)
        if same:
            again = client.ask(ids, options, extra_key=extra_key)
            same = again.report is not None and all(again.report[part] == report[part] for part in PARTS)
            a3_times += [again.ttft] if same else []
        step()
        full_times.append(full().ttft)
        step()
    parted = _parted(first.ids, plain.ids)
    return Explanation(
        prompt.name,
        model,
        options,
        pieces(tokenizer, ids),
        report,
        [(part, start, end) for part, start, end in detail["runs"]],
        _relevance(detail, len(ids)),
        _origins(ids, detail, donors),
        detail["stages"],
        _answered(tokenizer, first, a3_times),
        _answered(tokenizer, plain, full_times),
        parted,
        None if parted is None else (_candidates(tokenizer, first, parted), _candidates(tokenizer, plain, parted)),
    )


def _split(answer: Answer) -> tuple[dict[str, Any], dict[str, Any]]:
    report = dict(answer.report or {})
    if not report:
        raise ExplainError("the answer has no report: the server does not run with --radix-cache-backend a3")
    detail = report.pop("detail", None)
    if detail is None:
        why = "it only observes" if report.get("mode") == "observe" else "its log says why"
        raise ExplainError(f"the server did not report where the tokens came from: {why}")
    return report, detail


def _relevance(detail: dict[str, Any], length: int) -> list[float | None]:
    found: list[float | None] = [None] * length
    for span in detail["spans"]:
        if span["relevance"] is not None:
            found[span["start"] : span["end"]] = span["relevance"]
    return found


def _origins(ids: list[int], detail: dict[str, Any], donors: Sequence[Prompt]) -> list[Origin]:
    given = [donor.ids for donor in donors]

    def origin(start: int, end: int, kind: str, position: int, approximate: bool, donor: int | None) -> Origin:
        place = Origin(start, end, kind, position, approximate)
        if donor is None:
            return place
        one = donors[donor]
        beginning = " ".join(one.text.split())[:_BEGINNING]
        return Origin(start, end, kind, position, approximate, one.name, beginning, len(one.ids))

    found = []
    shared, known = longest_prefix(ids, given)
    for part, start, end in detail["runs"]:
        if part not in ("prefix", "continued"):
            continue
        kind = "exact" if part == "prefix" else part
        middle = min(max(known, start), end)
        if start < middle:
            found.append(origin(start, middle, kind, start, part == "continued", shared))
        if middle < end:
            found.append(origin(middle, end, kind, middle, part == "continued", None))
    for span in detail["spans"]:
        start, end, offset = span["start"], span["end"], span["offset"]
        place = find(ids, start, end, offset, given)
        approximate = span["generation"] > 0
        if place is None:
            found.append(origin(start, end, "reused", offset, approximate, None))
        else:
            found.append(origin(start, end, "reused", place.position, approximate, place.text))
    return found


def _answered(tokenizer: Any, first: Answer, times: list[float]) -> Answered:
    """The time of the first run, which warms up, counts only if there are no others."""
    times = times or [first.ttft]
    return Answered(pieces(tokenizer, first.ids), [round(one, 2) for one in times], round(statistics.median(times), 2))


def _parted(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _candidates(tokenizer: Any, answer: Answer, at: int) -> list[Choice]:
    candidates: list[Candidate] = answer.top[at] if at < len(answer.top) else []
    return [
        Choice(pieces(tokenizer, [one.token])[0], round(one.logprob, 4), one.token == answer.ids[at])
        for one in candidates
    ]
