"""A chat of ten short turns over documents that another user has asked about in another order.

    python examples/chat_over_documents.py --url http://127.0.0.1:30000

The first turn reuses the documents at their new positions. Each later turn continues the KV of the turn before.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

TOWN = json.loads(Path(__file__).with_name("town.json").read_text(encoding="utf-8"))


def documents(passages: list[dict[str, str]]) -> Any:
    # With a blank line after it, a document has the same tokens at any position.
    text = "".join(f"{one['title']}: {one['text']}\n\n" for one in passages)
    return {"role": "system", "content": f"Answer from these documents, in one sentence.\n\n{text}"}


def ask(client: OpenAI, messages: list[Any]) -> tuple[str, str]:
    """The answer, and the measurements as text."""
    started, first, pieces, report = time.perf_counter(), None, [], {}
    for chunk in client.chat.completions.create(
        model="default",
        messages=messages,
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            pieces.append(chunk.choices[0].delta.content)
        if chunk.usage:  # The last chunk.
            report = chunk.usage.a3
    computed = report["recomputed"] + report["gap"] + report["tail"]
    return "".join(pieces), (
        f"{(first or 0) * 1e3:.0f} ms to the first token; exact {report['prefix']}, continued {report['continued']}, "
        f"reused {report['reused']}, computed {computed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--turns", type=int, default=10)
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")

    other = [documents(TOWN["passages"][::-1]), {"role": "user", "content": "What do these documents describe?"}]
    print(f"somebody else\n  {ask(client, other)[1]}")

    chat = [documents(TOWN["passages"])]
    for turn, question in enumerate(TOWN["questions"][: args.turns], start=1):
        chat.append({"role": "user", "content": question})
        answer, measured = ask(client, chat)
        chat.append({"role": "assistant", "content": answer})
        print(f"turn {turn}: {question} {answer.strip()!r}\n  {measured}")


if __name__ == "__main__":
    main()
