"""Documents from files: JSON Lines, text files, folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from a3_sglang.warm import Document

LINES = (".jsonl", ".ndjson")
TEXTS = (".txt", ".md", ".markdown")
STANDARD_INPUT = Path("-")


@dataclass(frozen=True)
class InvalidSource:
    """A line or file that is not a document: where it is, and why."""

    place: str
    reason: str


def files(sources: Iterable[Path]) -> list[Path]:
    """The files of the sources; those of a folder are sorted by name.

    Raises:
        ValueError: names the source that cannot be read.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            below = sorted(path for path in source.rglob("*") if path.suffix in TEXTS and path.is_file())
            if not below:
                raise ValueError(f"{source}: no {' or '.join(TEXTS)} file below this folder")
            found += below
        elif source != STANDARD_INPUT and not source.is_file():
            raise ValueError(f"{source}: no such file or folder")
        elif source != STANDARD_INPUT and source.suffix not in LINES + TEXTS:
            raise ValueError(f"{source}: the name has to end in {', '.join(LINES + TEXTS)}")
        else:
            found.append(source)
    return found


def read(paths: Iterable[Path]) -> Iterator[Document | InvalidSource]:
    """The documents of files, one after the other: every line of a JSONL file, or a text file as a whole."""
    for path in paths:
        if path != STANDARD_INPUT and path.suffix in TEXTS:
            try:
                text = path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                yield InvalidSource(str(path), _why(error))
            else:
                yield Document(text, str(path)) if text.strip() else InvalidSource(str(path), "it is empty")
            continue
        with sys.stdin.buffer if path == STANDARD_INPUT else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(line, f"{path}:{number}")


def _document(line: bytes, place: str) -> Document | InvalidSource:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        return InvalidSource(place, _why(error))
    if not isinstance(record, dict):
        return InvalidSource(place, 'it is not an object with "text"')
    text = record.get("text")
    if "messages" in record:
        return InvalidSource(place, 'it has "messages"; a document is an object with "text"')
    if not isinstance(text, str) or not text.strip():
        return InvalidSource(place, '"text" is missing, empty or not a string')
    name = next((str(record[key]) for key in ("name", "title", "id") if record.get(key) is not None), place)
    return Document(text, name)


def _why(error: Exception) -> str:
    match error:
        case UnicodeDecodeError():
            return f"it is not UTF-8 (byte {error.start + 1})"
        case json.JSONDecodeError():
            return f"it is not JSON ({error.msg}, column {error.colno})"
        case _:
            return str(error)


def count(paths: Iterable[Path]) -> int | None:
    """Number of documents and wrong lines; None if standard input is among the files, as it can be read only once."""
    total = 0
    for path in paths:
        if path == STANDARD_INPUT:
            return None
        if path.suffix in TEXTS:
            total += 1
        else:
            with path.open("rb") as lines:
                total += sum(bool(line.strip()) for line in lines)
    return total
