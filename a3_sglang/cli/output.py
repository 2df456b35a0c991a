"""Progress of the commands, shown at once in terminals and elsewhere, and silencing of libraries."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from a3_sglang.client import Step

VERBOSE = "--verbose"
progress_console = Console(stderr=True)


def silence(environ: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Suppress warnings of SGLang and its libraries, in this process and in those that it starts.

    Errors are still shown, and variables that the user has set are left alone.
    """
    for name, value in {
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }.items():
        environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.getLogger("sglang").setLevel(logging.ERROR)


@contextmanager
def steps(
    title: str, total: int | None, done: int = 0, console: Console | None = None, pause: float = 0.0
) -> Iterator[Step]:
    """Progress of work in equal steps: a bar in a terminal, a line per step elsewhere.

    It is drawn only during the calls, because drawing between them would take time from a CPU engine under measurement.

    Args:
        title: what is done.
        total: number of steps; None: unknown.
        done: number of steps that were done before.
        console: shows it; stderr by default.
        pause: least seconds between lines; the line of the last step is always written.

    Yields:
        A function to call after every step.
    """
    console = console or progress_console
    if not console.is_terminal:
        count, started, printed = done, time.monotonic(), -math.inf
        _say(console, f"{title} ..." if total is None else f"{title}: {total - done} steps")

        def line() -> None:
            nonlocal count, printed
            count += 1
            now = time.monotonic()
            if now - printed >= pause or count == total:
                printed = now
                _say(console, f"{title}: {count}{'' if total is None else f'/{total}'} ({now - started:.0f} s)")

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task(title, total=total, completed=done)
        progress.refresh()

        def bar() -> None:
            progress.advance(task)
            progress.refresh()

        yield bar


@contextmanager
def working(title: str, console: Console | None = None) -> Iterator[None]:
    """A piece of work without steps: a spinner in a terminal, a line before and after it elsewhere."""
    console = console or progress_console
    if console.is_terminal:
        with console.status(f"{title} ..."):
            yield
        return
    started = time.monotonic()
    _say(console, f"{title} ...")
    yield
    _say(console, f"{title}: done in {time.monotonic() - started:.0f} s")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()
