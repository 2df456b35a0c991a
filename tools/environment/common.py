"""What the tools share: messages, commands, locks between processes, hashes and the cache folder.

Standard library only, as it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Seconds between progress messages of a long command.
HEARTBEAT = 10
# Written last: a folder without it is incomplete, and is rebuilt.
MARKER = ".complete"

SCRAPS = ("__pycache__", "*.pyc", "*.egg-info")
# Variables of the caller that would redirect an install or change what is imported.
_UNWANTED_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT")

_START = time.monotonic()


class ToolError(Exception):
    """An error that the user can act on; shown without a traceback."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "a3-sglang"


def run(command: list[str | Path], doing: str, progress: Callable[[], str] | None = None) -> None:
    """Run a command with its output on stderr; stdout is kept for the one line with the answer.

    ``progress``: said every few seconds while the command runs.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _UNWANTED_VARIABLES}
    variables.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PYTHONNOUSERSITE="1")
    with subprocess.Popen([str(part) for part in command], stdout=sys.stderr, env=variables) as process:
        while progress is not None:
            try:
                process.wait(HEARTBEAT)
                break
            except subprocess.TimeoutExpired:
                say(progress())
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0:
        raise ToolError(f"{doing} failed with exit status {process.returncode}")


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold ``path`` as a lock between processes, so that two of them do not make the same thing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is making {what}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def source_files(root: Path, names: Iterable[str]) -> list[Path]:
    files: list[Path] = []
    for name in names:
        path = root / name
        found = path.rglob("*") if path.is_dir() else [path]
        files += [file for file in found if file.is_file() and not any(file.match(scrap) for scrap in SCRAPS)]
    return sorted(file for file in files if "__pycache__" not in file.parts)


def hash_of(texts: Iterable[str], root: Path, files: Iterable[Path]) -> str:
    """Hash texts and files with their names; each part is preceded by its length, so no two lists collide."""
    digest = hashlib.sha256()
    parts = [text.encode() for text in texts]
    for file in files:
        parts += [file.relative_to(root).as_posix().encode(), file.read_bytes()]
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()
