"""Prompts over passages: the prompt under test, and the requests that leave its donors in the cache."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from a3_sglang.evaluation.questions import Question

INSTRUCTION = "Answer the question from the passages. Give the answer only, in a few words."
FOREIGN = 2
"""Number of passages of another question in a harvested donor."""

_MARK, _ANSWER, _NEXT = "<<passages>>", "<<answer>>", "<<next>>"

SHAPES = {
    "last": "the question after the passages",
    "first": "the question before the passages",
    "middle": "the question between the passages",
    "instructions": "the question after the passages, and 150 tokens of instructions after it",
    "second": "another question was asked over the same passages in the same order before",
    "new": "every second passage is new, and from another question",
    "turn": "the fifth turn of a chat over the passages",
    "tenth": "all passages were new in a fused prompt, and eight fused prompts had them in other orders since",
}
"""Shapes of prompts, including what was asked before them."""
_RULES = (
    "Follow these rules for the format of your answer. Write plain text without headings, lists or tables. Do not "
    "repeat the question and do not explain how you found the answer. Do not name the passages or their numbers. If "
    "the passages disagree, choose what most of them say. If none of them says it, answer with the single word "
    "unknown. Give names of people with first and last name, dates with day, month and year as far as they are known, "
    "and numbers in digits. Use the language of the question, keep the spelling of the passages, and leave out titles "
    "such as Mr or Dr. Never add a warning, a greeting or a question of your own. End after the answer.\n"
)


@dataclass(frozen=True)
class Case:
    """The prompts of one question.

    Attributes:
        prompt: token ids of the prompt under test.
        donors: by donor mode, the prompts whose KV it may reuse.
        before: prompts to ask with fusion before it, in order.
    """

    prompt: list[int]
    donors: dict[str, list[list[int]]]
    before: list[list[int]] = field(default_factory=list)


class Writer:
    """Writes prompts in a model's chat format. A passage has the same tokens at every position.

    Args:
        tokenizer: of the model; without a chat template, prompts are plain text.
        passages: number of passages kept per question.
        passage_tokens: tokens kept per passage.
        seed: of the choice and order of passages.
        shape: one of :data:`SHAPES`.
    """

    def __init__(self, tokenizer: Any, passages: int, passage_tokens: int, seed: int, shape: str = "last") -> None:
        self._shape = shape
        self._tokenizer, self._passages, self._length, self._seed = tokenizer, passages, passage_tokens, seed
        self._first: list[int] = []
        text = f"{INSTRUCTION}\n\n{_MARK}"
        if tokenizer.chat_template:
            messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": _MARK}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            messages += [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
            turns = tokenizer.apply_chat_template(messages, tokenize=False)
        else:
            # Base models may depend on their first token; chat templates write it themselves.
            self._first = list(tokenizer("").input_ids)
            text += "\nAnswer:"
            turns = f"{_ANSWER}\n\n{_NEXT}"
        self._before, self._after = text.split(_MARK)
        self._between = turns.split(_ANSWER)[1].split(_NEXT)[0]

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def case(self, questions: Sequence[Question], number: int) -> Case:
        """The prompt of question ``number``; the foreign passages come from the next one.

        The harvested donor is one earlier prompt with the same passages in another order among foreign ones. Compiled
        donors are each passage alone after the prompt's own beginning.
        """
        chooser = random.Random(f"{self._seed} {number}")
        chunks = self._chunks(questions[number], self._passages, chooser)
        foreign = self._chunks(questions[(number + 1) % len(questions)], FOREIGN, chooser)
        begin, after = [*self._first, *self.ids(self._before)], self.ids(self._after)
        if self._shape == "new":
            # Passages of one question share text, so its own are new in one case and the others in the next.
            chunks[1::2] = self._chunks(questions[(number + 2) % len(questions)], len(chunks) // 2, chooser)
        known = {"new": chunks[number % 2 :: 2], "tenth": []}.get(self._shape, chunks)
        earlier = [*known, *foreign]
        if all(chunk == chunks[0] for chunk in earlier):
            raise ValueError(f"question {number}: all passages are the same text")
        while earlier[0] == chunks[0]:
            chooser.shuffle(earlier)
        asked = [self.ids(f"Question: {questions[(number + i) % len(questions)].question}") for i in range(5)]
        before: list[list[int]] = []
        if self._shape in ("first", "middle"):
            place = 0 if self._shape == "first" else len(chunks) // 2
            question = [*asked[0], *self.ids("\n\n")]
            prompt = [*begin, *chain(*chunks[:place]), *question, *chain(*chunks[place:]), *after]
        elif self._shape == "turn":
            prompt = [*begin, *chain(*chunks)]
            for i in range(4, 0, -1):
                prompt = [*prompt, *asked[i], *after]
                before.append(prompt)
                answer = questions[(number + i) % len(questions)].answers[0]
                prompt = [*prompt, *self.ids(answer + self._between)]
            prompt = [*prompt, *asked[0], *after]
        else:
            rules = self.ids("\n" + _RULES) if self._shape == "instructions" else []
            context = [*begin, *chain(*chunks)]
            prompt = [*context, *asked[0], *rules, *after]
            if self._shape == "second":
                before.append([*context, *asked[1], *after])
            elif self._shape == "tenth":
                orders = [chooser.sample(chunks, len(chunks)) for _ in range(9)]
                # The donors hold only foreign passages; with these in front, the first prompt can be fused.
                orders[0] = [*earlier[::-1], *orders[0]]
                before += [[*begin, *chain(*order), *asked[1 + i % 4], *after] for i, order in enumerate(orders)]
        return Case(
            prompt=prompt,
            donors={
                "harvest": [[*begin, *chain(*earlier), *self.ids(f"Question: What is this about?{self._after}")]],
                "compiled": [begin + chunk for chunk in known],
            },
            before=before,
        )

    def _chunks(self, question: Question, count: int, chooser: random.Random) -> list[list[int]]:
        chosen = chooser.sample(range(len(question.ctxs)), min(count, len(question.ctxs)))
        if question.in_order:
            chosen.sort()
        ctxs = [question.ctxs[i] for i in chosen]
        texts = [f"{ctx.title}\n{ctx.text}" if ctx.title else ctx.text for ctx in ctxs]
        return [[*self.ids(text)[: self._length], *self.ids("\n\n")] for text in texts]
