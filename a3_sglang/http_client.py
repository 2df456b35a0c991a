"""A small HTTP client of SGLang's server: JSON requests and streamed answers. Standard library only."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TIMEOUT_SECONDS = 600
"""Longest wait for the server, the request's time in its queue included."""
_LONGEST_MESSAGE = 500
"""Characters of an error message."""


class NoAnswerError(RuntimeError):
    """The server cannot be reached, or the connection broke; the message is the reason."""


class StatusError(RuntimeError):
    """The server answered with an error; the message is the server's.

    Attributes:
        status: of the HTTP response.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Sends requests to one server.

    Args:
        url: of the server, without a path.
        api_key: of the server (``--api-key``).

    Every method raises :class:`NoAnswerError` or :class:`StatusError` if there is no good answer.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to one request: decoded JSON, or text if it is not JSON. A POST if there is a body."""
        with self._open(path, body) as response:
            return _decoded(response.read())

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events that answer a POST, each decoded from JSON."""
        with self._open(path, body) as response:
            for line in response:
                text = line.decode().removeprefix("data: ").strip()
                if text and text != "[DONE]":
                    yield json.loads(text)

    @contextmanager
    def _open(self, path: str, body: dict[str, Any] | None) -> Iterator[Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + path, data, self._headers)
            try:
                response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
            except urllib.error.HTTPError as error:
                raise StatusError(error.code, error_message(_decoded(error.read())) or error.reason) from None
            with response:
                yield response
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoAnswerError(str(getattr(error, "reason", error))) from None


def error_message(answer: Any) -> str:
    """The message in an error of the server, which wraps it differently from route to route and release to release."""
    while isinstance(answer, dict):
        answer = answer.get("message") or answer.get("error") or str(answer)
    return str(answer)[:_LONGEST_MESSAGE]


def _decoded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.decode(errors="replace")
