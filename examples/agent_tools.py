"""An agent that reads documents through a tool: two tasks with the tool results in different orders.

    python examples/agent_tools.py --url http://127.0.0.1:30000

The calls are fixed, so that the example runs with any model. What a tool returned in one task is reused in the other.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

TOWN = json.loads(Path(__file__).with_name("town.json").read_text(encoding="utf-8"))
PASSAGES = {one["title"]: one["text"] for one in TOWN["passages"]}
TASKS = {
    "Plan a day with a visit to the museum.": ["The museum", "The ferry", "The market", "The library", "The bridge"],
    "Plan a trip to the islands by train.": ["The railway", "The bridge", "The ferry", "The library", "The museum"],
}


def read(number: int, title: str) -> list[Any]:
    """One call of the tool ``read``, and its result."""
    call = {"name": "read", "arguments": json.dumps({"title": title})}
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"id": str(number), "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": str(number), "content": PASSAGES[title]},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    for task, titles in TASKS.items():
        messages: list[Any] = [{"role": "user", "content": task}]
        for number, title in enumerate(titles):
            messages += read(number, title)
        messages.append({"role": "user", "content": "Now write the plan."})
        started = time.perf_counter()
        answer = client.chat.completions.create(model="default", messages=messages, max_tokens=16, temperature=0)
        report = answer.usage.a3
        computed = report["recomputed"] + report["gap"] + report["tail"]
        print(f"{task} {answer.choices[0].message.content!r}")
        print(
            f"  {(time.perf_counter() - started) * 1e3:.0f} ms; exact {report['prefix']}, "
            f"continued {report['continued']}, reused {report['reused']}, computed {computed}"
        )


if __name__ == "__main__":
    main()
