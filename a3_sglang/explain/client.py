"""A client of a running server, as far as explaining a prompt needs one."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from a3_sglang.config import REQUEST_KEY

_SECONDS = 600


class ExplainError(RuntimeError):
    """The prompt cannot be explained; one line that says why."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have come next."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer.

    Attributes:
        ids: its tokens.
        ttft: milliseconds until the first of them arrived.
        report: of a3; None if the server has none.
        top: the most likely tokens at each of its positions, best first; empty unless asked for.
    """

    ids: list[int]
    ttft: float
    report: dict[str, Any] | None
    top: list[list[Candidate]]


class Client:
    """Asks a server of SGLang.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def model(self) -> dict[str, Any]:
        """What the server says of its model: ``model_path``, ``tokenizer_path``."""
        with self._open("/model_info") as answer:
            info: dict[str, Any] = json.loads(answer.read())
        return info

    def ask(
        self, ids: list[int], a3: bool | dict[str, Any], *, tokens: int = 1, top: int = 0, extra_key: str | None = None
    ) -> Answer:
        """One greedy, streamed request.

        Args:
            ids: tokens of the prompt.
            a3: its options.
            tokens: of the answer, at most.
            top: how many of the most likely tokens are wanted for each token of the answer.
            extra_key: the request's namespace.

        Raises:
            ExplainError: the server refuses, fails or cannot be reached.
        """
        body: dict[str, Any] = {
            "input_ids": ids,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "custom_params": {REQUEST_KEY: a3}},
        }
        if top:
            body |= {"return_logprob": True, "top_logprobs_num": top}
        if extra_key is not None:
            body["extra_key"] = extra_key
        started, ttft, last = time.perf_counter(), 0.0, None
        for event in self._events("/generate", body):
            last, ttft = event, ttft or (time.perf_counter() - started) * 1e3
        if last is None:
            raise ExplainError(f"{self._url} sent no answer")
        meta = last["meta_info"]
        candidates = [
            [Candidate(token, logprob) for logprob, token, _ in one] for one in meta.get("output_top_logprobs") or []
        ]
        return Answer(last["output_ids"], ttft, meta.get(REQUEST_KEY), candidates)

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._open(path, json.dumps(body).encode()) as lines:
            for line in lines:
                text = line.decode().removeprefix("data: ").strip()
                if not text or text == "[DONE]":
                    continue
                event = json.loads(text)
                if "error" in event:
                    raise ExplainError(f"{self._url}: {_message(event)}")
                yield event

    def _open(self, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(f"{self._url}{path}", body, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=_SECONDS)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                text = _message(json.loads(text))
            except ValueError:
                text = text[:200]
            raise ExplainError(f"{self._url}{path}: {text or error.reason}") from None
        except (OSError, ValueError) as error:
            raise ExplainError(f"{self._url} cannot be reached: {error}") from None


def _message(answer: Any) -> str:
    """The words in an error of the server, whatever it wraps them in."""
    while isinstance(answer, dict):
        answer = answer.get("error") or answer.get("message") or str(answer)
    return str(answer)
