"""Files of questions: this package's own layout, and those of LongBench, RULER and QCFuse, recognized by their fields.

| layout | passages | question | answers |
|---|---|---|---|
| own | ``ctxs``, a list of ``{"title", "text"}`` | ``question`` | ``answers`` |
| LongBench and LongBench-E (arXiv 2308.14508) | ``context``, one text | ``input`` | ``answers`` |
| QCFuse (arXiv 2606.05875) | ``context``, a list of texts | ``input`` | ``answers`` |
| RULER (arXiv 2404.06654) | ``input`` up to its last line | that line | ``outputs`` |
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from a3_sglang.evaluation.questions import Passage, Question

Split = Callable[[str], list[str]]
"""Cuts a text into passages."""

_UNASKED = {
    "gov_report": "Summarize the report.",
    "multi_news": "Summarize the news.",
    "lcc": "What is the next line of this code?",
    "passage_count": "How many different paragraphs are there if copies do not count?",
}
"""Questions of the subsets of LongBench whose ``input`` is empty."""
_WANTS_ALL = re.compile(r"\b(?:find all|what are all)\b", re.IGNORECASE)
"""RULER's questions whose answers are all wanted; of other questions any one answer is right."""
_ANSWER_PREFIX = re.compile(r" (?:Answer:|The special magic ).*$")
"""The beginning of the answer, which some versions of RULER append to the question."""


class _Record(BaseModel, ABC):
    @abstractmethod
    def read(self, split: Split) -> Question:
        """The question of a record."""


class _Own(_Record, Question):
    def read(self, split: Split) -> Question:
        return self


class _QCFuse(_Record):
    context: tuple[str, ...] = Field(min_length=1)
    input: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(min_length=1)

    def read(self, split: Split) -> Question:
        return _question(self.context, self.input, self.answers)


class _LongBench(_Record):
    context: str = Field(min_length=1)
    input: str
    answers: tuple[str, ...] = Field(min_length=1)
    dataset: str = ""

    def read(self, split: Split) -> Question:
        asked = self.input or _UNASKED.get(self.dataset.removesuffix("_e"))
        if not asked:
            raise ValueError(f"input: is empty, and the dataset {self.dataset!r} has no built-in question")
        return _question(split(self.context), asked, self.answers)


class _Ruler(_Record):
    input: str
    outputs: tuple[str, ...] = Field(min_length=1)

    def read(self, split: Split) -> Question:
        text, _, last = self.input.rstrip().rpartition("\n")
        if not text.strip():
            raise ValueError("input: is one line, but RULER's question is the last of several")
        return _question(split(text), _ANSWER_PREFIX.sub("", last).removeprefix("Question: "), self.outputs)


def load(path: Path, split: Split) -> list[Question]:
    """Questions of a file, JSON (a list) or JSON Lines.

    Args:
        path: of the file.
        split: cuts the texts of LongBench and RULER.

    Raises:
        ValueError: one line that names the file, the question and the field.
    """
    try:
        content = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {path}: {error.strerror if isinstance(error, OSError) else error}") from None
    questions: list[Question] = []
    try:
        for record in _records(content):
            questions.append(_layout(record).model_validate(record).read(split))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"--data {path}: question {len(questions)}: {field}: {problem['msg']}") from None
    except ValueError as error:
        raise ValueError(f"--data {path}: question {len(questions)}: {error}") from None
    if not questions:
        raise ValueError(f"--data {path}: no questions in it")
    return questions


def split_text(text: str, tokenizer: Any, tokens: int) -> list[str]:
    """Cut a text into consecutive passages of at most ``tokens`` tokens.

    A passage ends with the last line that ends within its second half, else with the last word that does, else
    anywhere.

    Args:
        text: the text.
        tokenizer: of the model, a fast one.
        tokens: per passage.
    """
    starts = [
        start for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    ]
    passages, begin, first = [], 0, 0
    while first < len(starts):
        limit = starts[first + tokens] if first + tokens < len(starts) else len(text)
        end, half = limit, (begin + limit) // 2
        if limit < len(text):
            # A space is left to the word after it, which without it might be more tokens.
            end = text.rfind("\n", half, limit) + 1 or max(text.rfind(" ", half, limit), 0) or limit
        passages.append(text[begin:end].rstrip())
        begin, first = end, bisect_left(starts, end, first + 1)
    return [passage for passage in passages if passage]


def _records(content: str) -> Iterable[Any]:
    if content.lstrip().startswith("["):
        yield from json.loads(content)
    else:
        yield from (json.loads(line) for line in content.splitlines() if line.strip())


def _layout(record: Any) -> type[_Record]:
    fields = record if isinstance(record, dict) else {}
    if "ctxs" in fields:
        return _Own
    if "outputs" in fields:
        return _Ruler
    if "context" in fields:
        return _QCFuse if isinstance(fields["context"], list) else _LongBench
    raise ValueError(
        "has none of the fields ctxs (this package's layout), context (LongBench, QCFuse) and outputs (RULER); it has "
        + (", ".join(fields) or "no fields")
    )


def _question(texts: Iterable[str], asked: str, answers: tuple[str, ...]) -> Question:
    """A question over parts of a text."""
    right = (", ".join(answers),) if _WANTS_ALL.search(asked) else answers
    passages = tuple(Passage(text=text) for text in texts if text.strip())
    return Question(ctxs=passages, question=asked, answers=right, in_order=True)
