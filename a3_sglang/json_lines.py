"""Files of JSON lines that a command appends to, and from which an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def complete_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, from 1.

    A last line without its end was interrupted. It is not among them, and once all others have been read, it is removed
    from the file.
    """
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    yield from enumerate(whole.splitlines(), 1)
    if whole != text:
        path.write_text(whole)
