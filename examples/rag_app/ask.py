"""Makes a prompt of passages and a question, and turns the server's stream into events for the page."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
from store import Passage

from a3_sglang.documents import documents

SYSTEM = "Answer the question from the passages before it, in one or two sentences."
ANSWER_TOKENS = 128

Event = dict[str, Any]


def messages(passages: list[Passage], question: str) -> Any:
    """The prompt. Each passage is tokenized the same way in every prompt."""
    user = documents(passage.text for passage in passages) + f"Question: {question}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


async def answer(
    client: openai.AsyncOpenAI, passages: list[Passage], question: str, compare: bool
) -> AsyncIterator[Event]:
    """Ask the server, and measure the time to the first token.

    Args:
        client: of the server.
        passages: the passages found, in the order of the prompt.
        question: the user's question.
        compare: also measure a full prefill of the same prompt, once the answer is complete.

    Yields:
        ``sources``; ``text`` for each piece of the answer; ``done`` with the time to the first token and the report
        of reuse; ``full`` with the time to the first token of the full prefill. ``error`` ends the events.
    """
    prompt = messages(passages, question)
    yield {"type": "sources", "sources": [{"document": one.document, "text": one.text} for one in passages]}
    try:
        async for event in _stream(client, prompt, ANSWER_TOKENS, {}):
            yield event
        if compare:
            # In a new namespace the request finds nothing in the cache, and no other request finds its KV.
            salt = {"custom_params": {"a3": False}, "extra_key": f"compare {uuid.uuid4()}"}
            async for event in _stream(client, prompt, 1, salt):
                if event["type"] == "done":
                    yield event | {"type": "full"}
    except (openai.OpenAIError, httpx.HTTPError) as error:
        yield {"type": "error", "message": explain(error, str(client.base_url))}


async def _stream(client: openai.AsyncOpenAI, prompt: Any, tokens: int, extra: dict[str, Any]) -> AsyncIterator[Event]:
    started, first, usage = time.perf_counter(), None, None
    stream = await client.chat.completions.create(
        model="default",
        messages=prompt,
        temperature=0,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    async with stream:
        async for chunk in stream:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                first = first or time.perf_counter()
                yield {"type": "text", "text": text}
            usage = chunk.usage or usage
    yield {
        "type": "done",
        "ttft_ms": ((first or time.perf_counter()) - started) * 1e3,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        # None on a server without a3.
        "a3": getattr(usage, "a3", None),
    }


def explain(error: Exception, url: str) -> str:
    """A message for the user about a failed request."""
    if isinstance(error, openai.APITimeoutError):
        return f"The model server at {url} took too long. Try again."
    if isinstance(error, openai.APIConnectionError | httpx.HTTPError):
        return f"The model server at {url} does not answer. Start it, or wait until it is up, and ask again."
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return f"The model server could not answer: {message or error}"
