"""What a3 would reuse of a log of requests, as a prefix and at any position."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from a3_sglang.config import REQUEST_KEY, ServerOptions
from a3_sglang.integration.shadow import Prompt, Shadow
from a3_sglang.matching.plan import QUESTION_TOKENS, Plan

SHOWN = 16
"""Tokens kept of a document's beginning."""


@dataclass
class LoggedRequest:
    """One request of a log.

    Attributes:
        tokens: of the prompt.
        answer: tokens of the answer; empty if the log does not have it.
        time: of its arrival, if the log has it.
        options: its ``custom_params["a3"]``.
        namespace: its ``extra_key`` and ``cache_salt``.
    """

    tokens: list[int]
    answer: list[int] = field(default_factory=list)
    time: datetime | None = None
    options: Any = True
    namespace: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class Skipped:
    """A line that could not be read as a request, by its number from 1 (in a dump, a request's), and why."""

    line: int
    reason: str


def read(path: Path, tokenizer: Any) -> Iterator[LoggedRequest | Skipped]:
    """The requests of a log, in its order.

    Args:
        path: JSON Lines of OpenAI requests (a request, one of OpenAI's batch files, or an object with ``request`` and
            ``response``) or of SGLang's native ones; plain text, one prompt per line; or a ``.pkl`` that SGLang
            dumped, which may run code when it is read, so only your own.
        tokenizer: of the model.
    """
    if path.suffix == ".pkl":
        with path.open("rb") as file:
            dumped = pickle.load(file)["requests"]
        records: Iterable[tuple[int, Any]] = enumerate(
            ({"request": vars(one[0]), "response": one[1], "time": one[2]} for one in dumped), 1
        )
    else:
        lines = enumerate(path.read_text().splitlines(), 1)
        records = ((number, line) for number, line in lines if line.strip())
    for number, record in records:
        try:
            yield _parse(record, tokenizer)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            yield Skipped(number, f"{type(error).__name__}: {error}")


def _parse(record: Any, tokenizer: Any) -> LoggedRequest:
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except json.JSONDecodeError:
            if record.lstrip().startswith(("{", "[")):
                raise
    if isinstance(record, str):
        record = {"prompt": record}
    body = next((record[name] for name in ("request", "body") if isinstance(record.get(name), dict)), record)
    custom = body.get("custom_params") or (body.get("sampling_params") or {}).get("custom_params") or {}
    tokens = _prompt(body, tokenizer)
    answer = _answer(record.get("response") or record)
    return LoggedRequest(
        tokens,
        answer if isinstance(answer, list) else _ids(answer, tokenizer),
        _time(record),
        custom.get(REQUEST_KEY, True),
        (body.get("extra_key"), body.get("cache_salt")),
    )


def _prompt(body: Mapping[str, Any], tokenizer: Any) -> list[int]:
    if body.get("messages") is not None:
        return list(
            tokenizer.apply_chat_template(
                body["messages"], tools=body.get("tools"), add_generation_prompt=True, return_dict=False
            )
        )
    given = next((body[name] for name in ("input_ids", "prompt", "text") if body.get(name) is not None), None)
    if isinstance(given, str):
        return _ids(given, tokenizer, special=True)
    if isinstance(given, list) and given and all(isinstance(token, int) for token in given):
        return given
    raise ValueError("no messages, prompt, text or input_ids of one request")


def _answer(response: Any) -> str | list[int]:
    """The answer as text or tokens; empty if there is no answer."""
    response = response.get("body", response)
    for name in ("output_ids", "answer", "output", "completion"):
        if isinstance(response.get(name), (str, list)):
            return response[name]
    choices = response.get("choices") or [{}]
    text = (choices[0].get("message") or {}).get("content") or choices[0].get("text")
    return text if isinstance(text, str) else ""


def _ids(text: str, tokenizer: Any, special: bool = False) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids if text else []
    return ids


def _time(record: Mapping[str, Any]) -> datetime | None:
    given = next((record[name] for name in ("time", "timestamp", "created", "created_at") if record.get(name)), None)
    if given is None:
        return None
    if isinstance(given, str) and not given.replace(".", "").isdigit():
        return datetime.fromisoformat(given)
    return datetime.fromtimestamp(float(given), UTC)


@dataclass
class Sums:
    """Sums over requests.

    Attributes:
        requests: number of requests.
        tokens: by part of the prompt (:data:`a3_sglang.reporting.report.PARTS`).
        prefix: tokens that stock SGLang would find in its tree.
        rows: rows that a3 would compute.
        results: requests by outcome; for full prefills with the reason.
    """

    requests: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    prefix: int = 0
    rows: int = 0
    results: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.tokens.total()

    @property
    def gain(self) -> float:
        """Rows that stock SGLang computes, divided by rows that a3 computes."""
        return (self.total - self.prefix) / max(self.rows, 1)


@dataclass
class Document:
    """A text that was reused.

    Attributes:
        begin: first tokens of the span that reused it first.
        times: number of times that it was reused.
        tokens: reused tokens in total.
    """

    begin: list[int]
    times: int = 0
    tokens: int = 0


@dataclass
class Analysis:
    """What a3 would do for a log.

    Attributes:
        all: of all requests.
        hours: by hour, if the log has times.
        documents: texts that were reused, keyed by the smallest of their window hashes, which does not depend on where
            a span begins.
    """

    all: Sums = field(default_factory=Sums)
    hours: dict[datetime, Sums] = field(default_factory=dict)
    documents: dict[int, Document] = field(default_factory=dict)


def analyze(
    requests: Iterable[LoggedRequest], options: ServerOptions, slots: int, chunk: int, line_ends: Any
) -> Analysis:
    """Replay requests one after the other, and sum up their tokens.

    Args:
        requests: in order of arrival.
        options: of the server.
        slots: size of the KV pool in tokens.
        chunk: rows per prefill step.
        line_ends: bool (vocabulary,), the tokens that end a line; None: unknown.
    """
    found = Analysis()
    plans: list[Plan] = []
    a3 = Shadow(options, slots, chunk, line_ends=line_ends, on_fuse=plans.append)
    stock = Shadow(options, slots, chunk)
    for request in requests:
        plans.clear()
        mine, theirs = (Prompt(request.tokens, allowed, *request.namespace) for allowed in (request.options, False))
        outcome, prefix = a3.ask(mine), stock.ask(theirs).counts[0]
        for shadow, prompt in ((a3, mine), (stock, theirs)):
            # The last token's KV is never computed.
            shadow.keep(prompt, [*request.tokens, *request.answer][: len(request.tokens) + len(request.answer) - 1])
        counts = outcome.parts
        rows = counts["recomputed"] + counts["gap"] + counts["tail"]
        result = outcome.result if outcome.result != "full" else f"full: {outcome.why}"
        sums = [found.all]
        if request.time is not None:
            sums.append(found.hours.setdefault(request.time.replace(minute=0, second=0, microsecond=0), Sums()))
        for one in sums:
            one.requests += 1
            one.tokens.update(counts)
            one.prefix += prefix
            one.rows += rows + (min(QUESTION_TOKENS, counts["tail"]) if plans else 0)
            one.results[result] += 1
        for span in (span for plan in plans for span in plan.spans):
            text = np.array(request.tokens[span.start : span.end], dtype=np.int32)
            hashes = a3.tree.index.hasher.window_hashes(None, text)
            if not len(hashes):
                continue  # A plan may cut its last span to less than a block.
            document = found.documents.setdefault(int(hashes.min()), Document(text[:SHOWN].tolist()))
            document.times += 1
            document.tokens += span.length
    return found
