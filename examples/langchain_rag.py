"""Retrieval with LangChain: a retriever, a prompt and ChatOpenAI in a chain.

    python examples/langchain_rag.py --url http://127.0.0.1:30000

Each question retrieves other passages, or the same in another order. Passages of earlier questions are reused.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_openai import ChatOpenAI

TOWN = json.loads(Path(__file__).with_name("town.json").read_text(encoding="utf-8"))
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from the passages, in one sentence."), ("user", "{context}\n\nQuestion: {question}")]
)


class WordRetriever(BaseRetriever):
    """Ranks documents by the words they share with the question; rare words count more."""

    documents: list[Document]
    k: int

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        words = [Counter(re.findall(r"\w+", one.page_content.lower())) for one in self.documents]

        def score(found: Counter[str]) -> float:
            asked = (word for word in set(re.findall(r"\w+", query.lower())) if found[word])
            return sum(math.log(1 + len(words) / sum(word in one for one in words)) for word in asked)

        order = sorted(range(len(words)), key=lambda i: -score(words[i]))
        return [self.documents[i] for i in order[: self.k]]


def joined(documents: list[Document]) -> str:
    # With a blank line after it, a passage has the same tokens at any position.
    return "\n\n".join(one.page_content for one in documents)


def summary(report: dict[str, Any]) -> str:
    computed = report["recomputed"] + report["gap"] + report["tail"]
    return f"exact {report['prefix']}, continued {report['continued']}, reused {report['reused']}, computed {computed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    args = parser.parse_args()
    documents = [Document(f"{one['title']}: {one['text']}") for one in TOWN["passages"]]
    model = ChatOpenAI(
        base_url=f"{args.url}/v1",
        api_key="none",
        model="default",
        temperature=0,
        max_tokens=16,
        extra_body={"custom_params": {"a3": {"ratio": 0.2}}},
        stream_usage=True,
    )
    context = WordRetriever(documents=documents, k=8) | joined
    chain = {"context": context, "question": RunnablePassthrough()} | PROMPT | model

    for question in TOWN["questions"][:4]:
        started = time.perf_counter()
        message = chain.invoke(question)
        milliseconds = (time.perf_counter() - started) * 1e3
        print(f"{question} {message.text.strip()!r}")
        print(f"  {milliseconds:.0f} ms; {summary(message.response_metadata['token_usage']['a3'])}")

    # When streaming, LangChain keeps only the usage that it knows: cached tokens, which are those not computed.
    started, first, whole = time.perf_counter(), None, None
    for chunk in chain.stream(TOWN["questions"][4]):
        first = first or (time.perf_counter() - started if chunk.text else None)
        whole = chunk if whole is None else whole + chunk
    usage = whole.usage_metadata
    print(f"{TOWN['questions'][4]} {whole.text.strip()!r}")
    print(f"  {(first or 0) * 1e3:.0f} ms to the first token; ", end="")
    print(f"cached {usage['input_token_details']['cache_read']} of {usage['input_tokens']}")


if __name__ == "__main__":
    main()
