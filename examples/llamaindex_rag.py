"""Retrieval with LlamaIndex: a retriever and a query engine over an OpenAI-like model.

    python examples/llamaindex_rag.py --url http://127.0.0.1:30000

Each question retrieves other passages, or the same in another order. Passages of earlier questions are reused.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from llama_index.core import QueryBundle
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.openai_like import OpenAILike
from pydantic import Field

TOWN = json.loads(Path(__file__).with_name("town.json").read_text(encoding="utf-8"))


class WordRetriever(BaseRetriever):
    """Ranks passages by the words they share with the question."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        asked = set(re.findall(r"\w+", query_bundle.query_str.lower()))
        nodes = [TextNode(text=f"{one['title']}: {one['text']}") for one in TOWN["passages"]]
        scored = [NodeWithScore(node=n, score=len(asked & set(re.findall(r"\w+", n.text.lower())))) for n in nodes]
        return sorted(scored, key=lambda one: -one.score)[:8]


class Reports(BaseEventHandler):
    """Keeps the last report: a query engine's response lacks the usage, but the event at the end of its chat has it."""

    last: dict[str, Any] = Field(default_factory=dict)

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if isinstance(event, LLMChatEndEvent) and event.response is not None:
            self.last = event.response.raw.usage.a3


def summary(report: dict[str, Any]) -> str:
    computed = report["recomputed"] + report["gap"] + report["tail"]
    return f"exact {report['prefix']}, continued {report['continued']}, reused {report['reused']}, computed {computed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    args = parser.parse_args()
    model = OpenAILike(
        model="default",
        api_base=f"{args.url}/v1",
        api_key="none",
        is_chat_model=True,
        context_window=8192,
        max_tokens=16,
        temperature=0,
        additional_kwargs={"extra_body": {"custom_params": {"a3": {"ratio": 0.2}}}},
    )
    reports = Reports()
    get_dispatcher().add_event_handler(reports)
    engine = RetrieverQueryEngine.from_args(WordRetriever(), llm=model)
    for question in TOWN["questions"][:4]:
        started = time.perf_counter()
        response = engine.query(question)
        milliseconds = (time.perf_counter() - started) * 1e3
        print(f"{question} {str(response).strip()!r}")
        print(f"  {milliseconds:.0f} ms; {summary(reports.last)}")

    # Without a query engine, the response has the usage.
    passages = [one.text for one in reversed(WordRetriever().retrieve(TOWN["questions"][0]))]
    text = "\n\n".join([*passages, f"Question: {TOWN['questions'][0]}"])
    started = time.perf_counter()
    response = model.chat([ChatMessage(role="user", content=text)])
    milliseconds = (time.perf_counter() - started) * 1e3
    print(f"{TOWN['questions'][0]} {response.message.content!r}")
    print(f"  {milliseconds:.0f} ms; {summary(response.raw.usage.a3)}")


if __name__ == "__main__":
    main()
