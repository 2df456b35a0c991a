"""Changes that chat clients make to a conversation between requests, with several chat templates, on a real server."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.serving import Served
from helpers.traffic import parts

pytestmark = pytest.mark.engine

TOWN = json.loads((Path(__file__).parents[2] / "examples" / "town.json").read_text(encoding="utf-8"))
TEXTS = [one["text"] for one in TOWN["passages"]]

OWN = "own"
"""SmolLM2's template, applied by the server."""
TEMPLATES = {
    # Like Llama 3's: the role in a header, then a blank line.
    "headers": "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    # Like Mistral's: brackets on the same line as the text.
    "brackets": "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}</s>"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS] {{ message.content }} [/TOOL_RESULTS]"
    "{% else %}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}",
}
"""Templates that the client applies; special tokens that the tokenizer does not know are plain text."""

Messages = list[dict[str, Any]]


class Chats:
    """Sends conversations.

    Args:
        server: receives them.
        model: folder with the tokenizer.
        template: a name of :data:`TEMPLATES`, or :data:`OWN`.
    """

    def __init__(self, server: Served, model: str, template: str) -> None:
        self.server, self.tokenizer, self.template = server, AutoTokenizer.from_pretrained(model), template

    def ask(self, messages: Messages, tokens: int = 4, a3: Any = True) -> tuple[dict[str, int], str]:
        """The report and the answer."""
        body = {"model": "default", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body["custom_params"] = {"a3": a3}
        if self.template == OWN:
            answer = self.server.post("/v1/chat/completions", body | {"messages": messages})
            text = answer["choices"][0]["message"]["content"]
        else:
            answer = self.server.post("/v1/completions", body | {"prompt": self.rendered(messages)})
            text = answer["choices"][0]["text"]
        report = answer["usage"]["a3"]
        assert parts(report) == answer["usage"]["prompt_tokens"]
        return report, text

    def rendered(self, messages: Messages) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=TEMPLATES.get(self.template), tokenize=False, add_generation_prompt=True
        )
        return text

    def tokens(self, *texts: str) -> int:
        return sum(len(self.tokenizer.encode(text)) for text in texts)


@pytest.fixture(params=[OWN, *TEMPLATES])
def chats(request: pytest.FixtureRequest, shared_server: Served, model: str) -> Chats:
    """A client of the server, whose cache is empty."""
    shared_server.flush()
    return Chats(shared_server, model, request.param)


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def reused(report: dict[str, int]) -> int:
    return report["reused"] + report["recomputed"]


def computed(report: dict[str, int]) -> int:
    return report["recomputed"] + report["gap"] + report["tail"]


def without_thinking(messages: Messages) -> Messages:
    """Strip thinking from earlier messages, as clients and templates of thinking models do."""
    return [one | {"content": one["content"].rpartition("</think>")[2].lstrip()} for one in messages]


THOUGHTS = f"<think>\n{TEXTS[8]} So I should look it up before I answer.\n</think>\n\n"


def test_what_follows_stripped_thinking_is_reused(chats: Chats) -> None:
    """The next prompt lacks the thinking, so everything after it has moved."""
    results = TEXTS[:3]
    start = [said("user", "Plan a day in the town.")]
    chat = [*start, said("assistant", f"{THOUGHTS}I look at the harbour first.")]
    chat += [said("tool", text) for text in results]
    report, answer = chats.ask(chat)
    assert reused(report) == 0
    chat = [*without_thinking(chat), said("assistant", answer), said("user", "And in the evening?")]
    fused, _ = chats.ask(chat)
    # A plain request does not see what the fused one left.
    stock, _ = chats.ask(chat, a3=False)
    # At the point at which the prompts diverge, line breaks may be tokenized differently from those at a text's end.
    assert fused["prefix"] == stock["prefix"] <= chats.tokens(chats.rendered(start)) + 2
    assert reused(fused) > 0.9 * chats.tokens(*results)
    assert computed(fused) < computed(stock) / 2


@pytest.mark.parametrize("chats", [OWN], indirect=True)
def test_an_answer_after_stripped_thinking_is_reused(chats: Chats) -> None:
    """The answer after the thinking is also found, as far as the client's text has the tokens that were decoded."""
    chat = [said("user", f"{TEXTS[0]}\n\nTell the story of this harbour in many words.")]
    params = {"temperature": 0, "max_new_tokens": 256, "ignore_eos": True}
    body = {"text": chats.rendered(chat) + THOUGHTS, "sampling_params": params}
    decoded = chats.server.post("/generate", body)
    chat += [said("assistant", decoded["text"]), said("user", "Go on.")]
    fused, _ = chats.ask(chat)
    stock, _ = chats.ask(chat, a3=False)
    assert fused["prefix"] == stock["prefix"]
    sent = chats.tokenizer.encode(chats.rendered(chat))
    runs = SequenceMatcher(None, decoded["output_ids"], sent, autojunk=False).get_matching_blocks()
    # A run ends at whole blocks of 16 tokens of the donor.
    findable = sum(run.size - 32 for run in runs if run.size >= 64)
    assert reused(fused) >= findable > 64


def test_tool_results_in_another_order(chats: Chats) -> None:
    def task(wish: str, order: list[int]) -> Messages:
        messages = [said("user", wish)]
        for i in order:
            messages += [said("assistant", f"read({TOWN['passages'][i]['title']!r})"), said("tool", TEXTS[i])]
        return messages

    chats.ask(task("Plan a day in the town.", [0, 1, 2, 3]))
    report, _ = chats.ask(task("Plan a rainy day instead.", [3, 1, 4, 0]))
    assert reused(report) > 0.75 * chats.tokens(TEXTS[3], TEXTS[1], TEXTS[0])
    assert report["gap"] + report["recomputed"] > 0.9 * chats.tokens(TEXTS[4])


def test_turns_dropped_from_the_start(chats: Chats) -> None:
    """A client keeps only the last turns, so the rest of the chat has moved to the front."""
    system = said("system", "Answer in one sentence.")
    chat = [system]
    for text, question in zip(TEXTS[:4], TOWN["questions"][:4], strict=True):
        chat.append(said("user", f"{text}\n\n{question}"))
        _, answer = chats.ask(chat, tokens=8)
        chat.append(said("assistant", answer))
    kept = [system, *chat[3:], said("user", TOWN["questions"][2])]
    report, _ = chats.ask(kept)
    assert report["prefix"] <= chats.tokens(chats.rendered([system])) + 8
    assert reused(report) > 0.75 * chats.tokens(*TEXTS[1:4])


def test_parts_of_one_message(shared_server: Served, model: str) -> None:
    """OpenAI's messages may be a list of parts; here each part is a passage."""
    shared_server.flush()
    chats = Chats(shared_server, model, OWN)

    def message(order: list[int], question: str) -> Messages:
        texts = [*(f"{TEXTS[i]}\n\n" for i in order), question]
        return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]

    chats.ask(message([0, 1, 2, 3], "What is the town known for?"))
    report, _ = chats.ask(message([2, 0, 3, 1], "What is the town proud of?"))
    assert reused(report) > 0.75 * chats.tokens(*TEXTS[:4])
