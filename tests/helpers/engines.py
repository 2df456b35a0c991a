"""Real engines for the tests: one at a time, kept while tests ask for the same; their starts are counted."""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3_sglang.client import engine, environment, flush
from helpers import forking

POOL = {"chunked_prefill_size": 2048, "max_total_tokens": 16384}
OPTIONS = {"A3_MIN_SAVING": "0", "A3_REPORT": "exact"}
"""For short prompts, and tests of exact counts."""


@dataclass
class Starts:
    """Number of engines and servers that were started, and the time that took."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


STARTS = Starts()


@functools.cache
def prepare() -> None:
    """Make starts of engines in this process cheap, and count them. The first call imports SGLang."""
    forking.spare_server()
    cls = importlib.import_module("sglang.srt.entrypoints.engine").Engine
    initialize = cls.__init__

    @functools.wraps(initialize)
    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        started = time.monotonic()
        initialize(self, *args, **kwargs)
        STARTS.add(time.monotonic() - started)

    cls.__init__ = counted


class Engines:
    """The one engine that tests share."""

    def __init__(self) -> None:
        self._key: Any = None
        self._stack = ExitStack()
        self._shared: tuple[Any, Path] | None = None

    def get(
        self, model: str, backend: str | None, options: dict[str, str] | None = None, **arguments: Any
    ) -> tuple[Any, Path]:
        """An engine with an empty cache, and the folder that receives the KV of its requests.

        A running one with other settings is stopped. The variables stay set while the engine runs, because this
        process reads them when it sends requests.

        Args:
            model: folder of the model.
            backend: "a3", or None for stock SGLang.
            options: ``A3_*`` variables, besides :data:`OPTIONS`.
            arguments: of the engine, besides :data:`POOL`.
        """
        variables = OPTIONS | (options or {}) if backend else {}
        arguments = POOL | {"dtype": os.environ["A3_TEST_DTYPE"]} | arguments
        key = model, backend, sorted(variables.items()), sorted(arguments.items())
        if self._shared is None or key != self._key:
            self.stop()
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="a3-kv-")))
                stack.enter_context(environment(**variables, A3_DUMP_KV=str(folder)))
                self._shared = stack.enter_context(engine(model, backend, **arguments)), folder
                self._key, self._stack = key, stack.pop_all()
        running, folder = self._shared
        flush(running)
        for file in folder.iterdir():
            file.unlink()
        return running, folder

    def stop(self) -> None:
        self._shared = None
        self._stack.close()


ENGINES = Engines()
