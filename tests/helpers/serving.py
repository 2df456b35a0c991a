"""Real servers for tests that are clients of them: one at a time, kept while tests ask for the same."""

from __future__ import annotations

import json
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3_sglang.local_server import local_server
from helpers.engines import OPTIONS, STARTS

SETTINGS = ("--max-total-tokens", "32768", "--chunked-prefill-size", "8192", "--context-length", "4096")


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        url: of it.
        folder: receives the KV of its requests, if it dumps that.
        log: file with its output.
    """

    url: str
    folder: Path
    log: Path

    def request(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Status and answer to a JSON body: decoded JSON, or the text of an error."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | dict(headers or {})
        try:
            request = urllib.request.Request(f"{self.url}{path}", data, given)
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
        """The answer to a JSON body; an error's text is part of the exception."""
        status, answer = self.request(path, body, headers)
        assert status == 200, f"{path}: {status} {str(answer)[:500]}"
        return answer

    def flush(self) -> None:
        """Empty the cache."""
        flush(self.url, self.log)


def flush(url: str, log: Path) -> None:
    """Empty a server's cache. SGLang does so only while nothing is in use."""
    deadline = time.monotonic() + 60
    while True:
        request = urllib.request.Request(f"{url}/flush_cache", data=b"")
        try:
            with urllib.request.urlopen(request, timeout=60):
                return
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline, f"something is still in use: {log.read_text()[-3000:]}"
            time.sleep(0.2)


class Servers:
    """The one server that tests share."""

    def __init__(self) -> None:
        self._key: Any = None
        self._stack = ExitStack()
        self._shared: Served | None = None

    def get(
        self, model: str, arguments: Sequence[str] = (), variables: Mapping[str, str] | None = None, dump: bool = False
    ) -> Served:
        """A server with exact counts in its reports and an empty cache. A running one with other settings is stopped.

        Args:
            model: folder of the model.
            arguments: of the server, besides :data:`SETTINGS`.
            variables: of its environment, besides :data:`helpers.engines.OPTIONS`.
            dump: whether it dumps the KV of its requests.
        """
        key = model, tuple(arguments), sorted((variables or {}).items()), dump
        if self._shared is None or key != self._key:
            self.stop()
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="a3-server-")))
                given = OPTIONS | dict(variables or {}) | ({"A3_DUMP_KV": str(folder)} if dump else {})
                command = ("--dtype", os.environ["A3_TEST_DTYPE"], *SETTINGS, *arguments)
                started = time.monotonic()
                url = stack.enter_context(local_server(model, folder / "log", *command, variables=given))
                STARTS.add(time.monotonic() - started)
                self._shared = Served(url, folder, folder / "log")
                self._key, self._stack = key, stack.pop_all()
        self._shared.flush()
        return self._shared

    def stop(self) -> None:
        self._shared = None
        self._stack.close()


SERVERS = Servers()
