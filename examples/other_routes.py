"""Anthropic's, OpenAI's Responses and Ollama's routes: options in the header x-a3, and what each answer reports.

    python examples/other_routes.py --url http://127.0.0.1:30000

These routes have no field for a3's options and no report. If a route's usage has a count of cached tokens, it covers
all tokens that were not computed; the server has to run with --enable-cache-report (a3_sglang.launch_server does).
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from anthropic import Anthropic
from openai import OpenAI

TOWN = json.loads(Path(__file__).with_name("town.json").read_text(encoding="utf-8"))
PASSAGES = [f"{one['title']}: {one['text']}" for one in TOWN["passages"]]
HEADERS = {"x-a3": json.dumps({"ratio": 0.2})}
"""Headers of every request; {"x-a3": "false"} asks for a full prefill."""


def prompt(turn: int, question: str) -> str:
    # With a blank line after it, a passage has the same tokens at any position.
    return "\n\n".join([*PASSAGES[turn:], *PASSAGES[:turn], f"Question: {question}"])


def anthropic_messages(url: str, text: str) -> str:
    client = Anthropic(base_url=url, api_key="none", default_headers=HEADERS)
    usage = client.messages.create(model="default", max_tokens=8, messages=[{"role": "user", "content": text}]).usage
    cached = usage.cache_read_input_tokens or 0
    return f"cached {cached} of {usage.input_tokens + cached}"


def openai_responses(url: str, text: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", default_headers=HEADERS)
    served = client.models.list().data[0].id  # This route does not accept the name "default".
    usage = client.responses.create(model=served, input=text, max_output_tokens=8).usage
    return f"cached {usage.input_tokens_details.cached_tokens} of {usage.input_tokens}"


def ollama_chat(url: str, text: str) -> str:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": text}],
        "stream": False,
        "options": {"num_predict": 8},
    }
    request = urllib.request.Request(
        f"{url}/api/chat", json.dumps(body).encode(), {"Content-Type": "application/json", **HEADERS}
    )
    with urllib.request.urlopen(request) as answer:
        return f"{json.load(answer)['prompt_eval_count']} tokens of prompt; the route does not count cached ones"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    args = parser.parse_args()
    routes: dict[str, Callable[[str, str], str]] = {
        "/v1/messages": anthropic_messages,
        "/v1/responses": openai_responses,
        "/api/chat": ollama_chat,
    }
    turn = 0
    for route, ask in routes.items():
        for question in TOWN["questions"][:2]:
            started = time.perf_counter()
            reported = ask(args.url, prompt(turn, question))
            print(f"{route}: {(time.perf_counter() - started) * 1e3:.0f} ms; {reported}")
            turn += 5


if __name__ == "__main__":
    main()
