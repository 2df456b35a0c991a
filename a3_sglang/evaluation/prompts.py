"""Prompts over passages: the one under test, and the requests that leave its donors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from a3_sglang.evaluation.questions import Question

INSTRUCTION = "Answer the question from the passages. Give the answer only, in a few words."
FOREIGN = 2
"""Passages of other questions in a harvested donor."""

_MARK = "<<passages>>"


@dataclass(frozen=True)
class Case:
    """One question, ready to be asked.

    Attributes:
        prompt: token ids of the prompt under test.
        donors: by donor mode, the prompts whose KV it may reuse.
    """

    prompt: list[int]
    donors: dict[str, list[list[int]]]


class Writer:
    """Writes prompts in a model's chat format, every passage as the same tokens wherever it stands.

    Args:
        tokenizer: of the model; without a chat template plain text is written.
        passages: passages a question keeps.
        passage_tokens: tokens a passage keeps.
        seed: of the choice and order of passages.
    """

    def __init__(self, tokenizer: Any, passages: int, passage_tokens: int, seed: int) -> None:
        self._tokenizer, self._passages, self._length, self._seed = tokenizer, passages, passage_tokens, seed
        text = f"{INSTRUCTION}\n\n{_MARK}"
        if tokenizer.chat_template:
            messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": _MARK}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text += "\nAnswer:"
        self._before, self._after = text.split(_MARK)

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def case(self, questions: Sequence[Question], number: int) -> Case:
        """The prompt of question ``number``; the foreign passages come from the next one.

        Harvested donors are one earlier prompt with the same passages in another order among foreign ones. Compiled
        donors are each passage alone behind the prompt's own beginning.
        """
        chooser = random.Random(f"{self._seed} {number}")
        chunks = self._chunks(questions[number], self._passages, chooser)
        foreign = self._chunks(questions[(number + 1) % len(questions)], FOREIGN, chooser)
        begin = self.ids(self._before)
        end = self.ids(f"Question: {questions[number].question}{self._after}")
        earlier = [*chunks, *foreign]
        while earlier[0] == chunks[0]:
            chooser.shuffle(earlier)
        return Case(
            prompt=[*begin, *chain(*chunks), *end],
            donors={
                "harvest": [[*begin, *chain(*earlier), *self.ids(f"Question: What is this about?{self._after}")]],
                "compiled": [begin + chunk for chunk in chunks],
            },
        )

    def _chunks(self, question: Question, count: int, chooser: random.Random) -> list[list[int]]:
        chosen = chooser.sample(question.ctxs, min(count, len(question.ctxs)))
        texts = [f"{ctx.title}\n{ctx.text}" if ctx.title else ctx.text for ctx in chosen]
        return [[*self.ids(text)[: self._length], *self.ids("\n\n")] for text in texts]
