"""The requests that explaining a prompt needs: the server's model, and greedy answers with their reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from a3_sglang import http_client
from a3_sglang.config import REQUEST_KEY


class ExplainError(RuntimeError):
    """The prompt cannot be explained; the message is one line that says why."""


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
        report: a3's report; None if the server sent none.
        top: the most likely tokens at each of its positions, best first; empty unless asked for.
    """

    ids: list[int]
    ttft: float
    report: dict[str, Any] | None
    top: list[list[Candidate]]


class Client:
    """Sends requests to an SGLang server.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._url, self._http = url.rstrip("/"), http_client.Client(url)

    def model(self) -> dict[str, Any]:
        """The server's model: ``model_path``, ``tokenizer_path``."""
        with self._errors("/model_info"):
            info: dict[str, Any] = self._http.call("/model_info")
        return info

    def ask(
        self, ids: list[int], a3: bool | dict[str, Any], *, tokens: int = 1, top: int = 0, extra_key: str | None = None
    ) -> Answer:
        """Send one greedy, streamed request.

        Args:
            ids: tokens of the prompt.
            a3: its options.
            tokens: of the answer, at most.
            top: number of most likely tokens to return for each token of the answer.
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
        with self._errors("/generate"):
            for event in self._http.events("/generate", body):
                if "error" in event:
                    raise ExplainError(f"{self._url}: {http_client.error_message(event)}")
                last, ttft = event, ttft or (time.perf_counter() - started) * 1e3
        if last is None:
            raise ExplainError(f"{self._url} sent no answer")
        meta = last["meta_info"]
        candidates = [
            [Candidate(token, logprob) for logprob, token, _ in one] for one in meta.get("output_top_logprobs") or []
        ]
        return Answer(last["output_ids"], ttft, meta.get(REQUEST_KEY), candidates)

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Raise errors of the HTTP client as :class:`ExplainError`."""
        try:
            yield
        except http_client.StatusError as error:
            raise ExplainError(f"{self._url}{path}: {error}") from None
        except http_client.NoAnswerError as error:
            raise ExplainError(f"{self._url} cannot be reached: {error}") from None
