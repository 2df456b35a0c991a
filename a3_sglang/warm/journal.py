"""Which documents a server holds, so that a run can be resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from a3_sglang.json_lines import complete_lines
from a3_sglang.warm import Document


class Journal:
    """Which documents a server holds, in memory and, to resume a run, in a file of JSON lines.

    Args:
        path: of the file; None: only in memory.
        start: the server's, see :class:`a3_sglang.warm.ServerInfo`; lines of other starts are ignored.
        before: what precedes every document: the system message and the cache salt.

    Raises:
        ValueError: the file cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path | None, start: str, before: tuple[str | None, ...]) -> None:
        self._path, self._start, self._before = path, start, before
        self._tokens: dict[str, int] = {}
        if path is None:
            return
        try:
            path.touch()
            self._read(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(str(error)) from None

    def _read(self, path: Path) -> None:
        for number, line in complete_lines(path):
            try:
                record = json.loads(line)
                if record["start"] != self._start:
                    continue
                if record["document"] is None:
                    self._tokens.clear()
                else:
                    self._tokens[record["document"]] = record["tokens"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number} was not written by this command") from None

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, document: Document) -> int | None:
        """Tokens of a document without the template; None if the server does not hold it."""
        return self._tokens.get(self.key(document))

    def add(self, document: Document, tokens: int) -> None:
        self._tokens[self.key(document)] = tokens
        self._write(self.key(document), tokens)

    def forget(self) -> None:
        """Remove all documents: the server's cache was flushed."""
        self._tokens.clear()
        self._write(None, 0)

    def _write(self, key: str | None, tokens: int) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"start": self._start, "document": key, "tokens": tokens}) + "\n")

    def key(self, document: Document) -> str:
        """Hash of a document's text and what precedes it."""
        return hashlib.sha256(json.dumps([*self._before, document.text.strip()]).encode()).hexdigest()[:32]
