"""A real server for tests that are clients of it."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3_sglang.local_server import local_server
from helpers.engines import OPTIONS, STARTS


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        url: of it.
        log: file with its output.
    """

    url: str
    log: Path

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        """The answer to a JSON body; an error's text is part of the exception."""
        given = {"Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), given)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()[:500]}") from None

    def flush(self) -> None:
        """Empty the cache, which SGLang does only while nothing is in use."""
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(urllib.request.Request(f"{self.url}/flush_cache", b""), timeout=30):
                    return
            except urllib.error.HTTPError:
                assert time.monotonic() < deadline, "something is still in use"
                time.sleep(0.2)


@contextmanager
def serving(model: str, folder: Path, *arguments: str) -> Iterator[Served]:
    """A server with exact counts in its reports, stopped at the end; nothing may be in use then."""
    settings = ["--dtype", os.environ["A3_TEST_DTYPE"], "--max-total-tokens", "32768", "--chunked-prefill-size", "8192"]
    started = time.monotonic()
    with local_server(model, folder / "log", *settings, *arguments, variables=OPTIONS) as url:
        STARTS.add(time.monotonic() - started)
        served = Served(url, folder / "log")
        yield served
        served.flush()
