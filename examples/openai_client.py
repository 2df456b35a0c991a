"""Questions over the same passages in a different order each time, with OpenAI's client.

    python examples/openai_client.py --url http://127.0.0.1:30000

The first question finds nothing and is prefilled in full. The others reuse the passages' KV at their new positions.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

TOWN = json.loads(Path(__file__).with_name("town.json").read_text(encoding="utf-8"))
OPTIONS = {"custom_params": {"a3": {"ratio": 0.2}}}
"""Recompute 20% of the reused tokens; without this the server's own ratio applies."""


def messages(question: str, chooser: random.Random) -> list[Any]:
    passages = chooser.sample(TOWN["passages"], len(TOWN["passages"]))
    # With a blank line after it, a passage has the same tokens at any position.
    context = "\n\n".join(f"{one['title']}: {one['text']}" for one in passages)
    return [
        {"role": "system", "content": "Answer from the passages, in one sentence."},
        {"role": "user", "content": f"{context}\n\nQuestion: {question}"},
    ]


def summary(report: dict[str, Any]) -> str:
    computed = report["recomputed"] + report["gap"] + report["tail"]
    return f"exact {report['prefix']}, continued {report['continued']}, reused {report['reused']}, computed {computed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the passages' orders")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    chooser = random.Random(args.seed)
    ask: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 16, "extra_body": OPTIONS}

    for question in TOWN["questions"][: args.questions]:
        started, first, pieces = time.perf_counter(), None, []
        stream = client.chat.completions.create(
            messages=messages(question, chooser), stream=True, stream_options={"include_usage": True}, **ask
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - started
                pieces.append(chunk.choices[0].delta.content)
            if chunk.usage:  # The last chunk.
                print(f"{question} {''.join(pieces).strip()!r}")
                print(f"  {(first or 0) * 1e3:.0f} ms to the first token; {summary(chunk.usage.a3)}")

    question = TOWN["questions"][args.questions % len(TOWN["questions"])]
    answer = client.chat.completions.create(messages=messages(question, chooser), **ask)
    print(f"{question} {answer.choices[0].message.content!r}")
    print(f"  not streamed; {summary(answer.usage.a3)}")


if __name__ == "__main__":
    main()
