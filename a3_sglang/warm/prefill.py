"""Prefill documents ahead of time on a running server, so that the first question over them finds their KV.

Standard library only: an app that uploads documents can call :func:`warm` without SGLang installed.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

from a3_sglang.documents import documents as join
from a3_sglang.http_client import Client, NoAnswerError, StatusError

_REFUSES_ALL = (401, 403, 404, 405)
"""HTTP statuses that do not depend on the document."""
_NEXT = "-"
"""Placeholder for the text that follows a document in a prompt. Without it, a chat template may strip the blank line
after the document, and many tokenizers encode a blank line differently at the end of a text."""


class ServerError(RuntimeError):
    """The server does not answer, refuses all requests, or runs without a3."""


@dataclass(frozen=True)
class Document:
    """A text as prompts will contain it.

    Attributes:
        text: without the text around it in prompts; leading and trailing white space is ignored.
        name: for messages.
    """

    text: str
    name: str = ""


@dataclass(frozen=True)
class Warmed:
    """The outcome of one document.

    Attributes:
        document: the document.
        tokens: of its request: the chat template, the system message and the document; 0 after an error.
        cached: of them, tokens whose KV the server had before; rounded to 64 if it runs without
            ``--enable-cache-report``.
        error: why the document was not prefilled: it is empty, longer than the model's context or than the KV pool,
            or the server failed on it. None if it was prefilled.
    """

    document: Document
    tokens: int
    cached: int
    error: str | None


@dataclass(frozen=True)
class ServerInfo:
    """What a server reports about itself.

    Attributes:
        start: a value that changes whenever the server is restarted.
        slots: tokens that its KV pool holds, summed over all replicas; None if the server does not report it.
        token_bytes: bytes of KV per token, computed from the pool's size, which the server rounds to MiB; None if the
            pool is too small for that.
    """

    start: str
    slots: int | None
    token_bytes: float | None


def warm(
    url: str,
    documents: Iterable[Document],
    *,
    system: str | None = None,
    concurrency: int = 1,
    rate: float | None = None,
    api_key: str | None = None,
    cache_salt: str | None = None,
) -> Iterator[Warmed]:
    """Prefill documents as donors on a running server with a3.

    Each one is sent alone as a user message that is prefilled in full (``{"donor": true}``), in the server's own chat
    template after the system message. It works with ``--a3-donors harvest`` and ``compiled``. A prompt then reuses
    the documents in any order if they are separated by blank lines, see :func:`a3_sglang.documents.documents`. A
    document that is in the cache already costs one row.

    Documents are taken from the iterable as requests finish, and results come in the order of completion. A document
    that fails is a result with an error. Closing the iterator waits for the requests that are in flight.

    Args:
        url: of the server, without ``/v1``.
        documents: may be endless.
        system: the system message of the prompts to come.
        concurrency: requests that are sent at once.
        rate: requests per second, at most; None: no limit.
        api_key: of the server (``--api-key``).
        cache_salt: the namespace of the prompts to come.

    Raises:
        ValueError: ``concurrency`` or ``rate`` is out of range; raised by the call itself.
        ServerError: while iterating; documents without a result may or may not have been prefilled.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency: must be at least 1, not {concurrency}")
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"rate: must be a positive number of documents per second, not {rate}")
    common: dict[str, Any] = {"model": "default", "max_tokens": 1, "temperature": 0}
    common["custom_params"] = {"a3": {"donor": True}}
    if cache_salt is not None:
        common["cache_salt"] = cache_salt
    before = [] if system is None else [{"role": "system", "content": system}]

    stopped = threading.Event()

    def send(document: Document, delay: float) -> Warmed:
        if stopped.wait(delay):
            return Warmed(document, 0, 0, "not sent")
        if not document.text.strip():
            return Warmed(document, 0, 0, "the document is empty")
        message = {"role": "user", "content": join([document.text]) + _NEXT}
        try:
            answer = _call(url, "/v1/chat/completions", api_key, common | {"messages": [*before, message]})
        except StatusError as error:
            return Warmed(document, 0, 0, str(error))
        usage = answer.get("usage") or {}
        report = usage.get("a3")
        if report is None:
            raise ServerError(f"the server at {url} runs without a3; start it with --radix-cache-backend a3")
        details = usage.get("prompt_tokens_details") or {}
        return Warmed(document, usage["prompt_tokens"], details.get("cached_tokens", report["prefix"]), None)

    def results() -> Iterator[Warmed]:
        coming, pace = iter(documents), Pace(rate)
        running: set[Future[Warmed]] = set()
        with ThreadPoolExecutor(concurrency) as pool:
            try:
                while True:
                    for document in islice(coming, concurrency - len(running)):
                        running.add(pool.submit(send, document, pace.delay(time.monotonic())))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for one in done:
                        yield one.result()
            finally:
                stopped.set()

    return results()


class Pace:
    """Start times that are at least ``1 / rate`` seconds apart; a late start does not let later ones catch up."""

    def __init__(self, rate: float | None) -> None:
        self._gap = 1 / rate if rate else 0.0
        self._next = -math.inf

    def delay(self, now: float) -> float:
        """Seconds to wait until the next start; each call reserves one."""
        start = max(now, self._next)
        self._next = start + self._gap
        return start - now


def server_info(url: str, api_key: str | None = None) -> ServerInfo:
    """Ask a server about its start and its KV pool.

    Raises:
        ServerError: it does not answer, or is not an SGLang server.
    """
    try:
        info = _call(url, "/server_info", api_key)
    except StatusError as error:
        raise ServerError(f"the server at {url} refuses /server_info ({error.status}): {error}") from None
    state: dict[str, Any] = next(iter(info.get("internal_states") or ()), {})
    # Start times in nanoseconds, and a seed that is random unless it was given.
    start = json.dumps([info.get(key) for key in ("startup_time", "random_seed", "launch_command", "model_path")])
    memory = state.get("memory_usage") or {}
    slots = info.get("max_total_num_tokens")
    gibibytes, capacity = memory.get("kvcache"), memory.get("token_capacity")
    return ServerInfo(
        start=hashlib.sha256(start.encode()).hexdigest()[:16],
        slots=None if slots is None else slots * (info.get("dp_size") or 1),
        token_bytes=gibibytes * 2**30 / capacity if gibibytes and capacity else None,
    )


def _call(url: str, path: str, api_key: str | None, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The server's answer.

    Raises:
        StatusError: the server refuses this request.
        ServerError: no answer, or one that does not depend on the request.
    """
    if not url.startswith(("http://", "https://")):
        raise ServerError(f"{url!r} is not the URL of a server, such as http://127.0.0.1:30000")
    try:
        answer = Client(url, api_key).call(path, body)
    except NoAnswerError as error:
        raise ServerError(f"the server at {url} does not answer: {error}") from None
    except StatusError as error:
        if error.status in _REFUSES_ALL:
            raise ServerError(f"the server at {url} refuses {path} ({error.status}): {error}") from None
        raise
    if not isinstance(answer, dict):
        raise ServerError(f"the server at {url} does not answer {path} as SGLang does")
    return answer
