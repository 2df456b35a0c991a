"""Cuts documents into passages and searches these with SQLite's full-text index: ``cut``, ``add``, ``search``."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

LONGEST = 1300
"""Most characters of a passage: 200 to 250 English words."""
BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
SENTENCE_ENDS = (". ", "! ", "? ", "\n", "。")


@dataclass(frozen=True)
class Passage:
    """A passage of a document.

    Attributes:
        document: name of the document.
        text: without leading and trailing white space.
    """

    document: str
    text: str


class Store:
    """All passages, in a file or in memory. Words match by their stems, without case and accents.

    Args:
        path: of the database, which is created if it does not exist.
    """

    def __init__(self, path: str = ":memory:") -> None:
        self._database = sqlite3.connect(path)
        self._database.execute(
            "CREATE VIRTUAL TABLE IF NOT EXISTS passages USING fts5"
            "(text, document UNINDEXED, tokenize = 'porter unicode61 remove_diacritics 2')"
        )

    def add(self, document: str, passages: list[str]) -> None:
        """Store the passages of a document, replacing its earlier ones."""
        with self._database:
            self._database.execute("DELETE FROM passages WHERE document = ?", (document,))
            rows = [(text, document) for text in passages]
            self._database.executemany("INSERT INTO passages (text, document) VALUES (?, ?)", rows)

    def remove(self, document: str) -> None:
        self.add(document, [])

    def documents(self) -> list[tuple[str, int]]:
        """Each document's name and number of passages, oldest first."""
        query = "SELECT document, count(*) FROM passages GROUP BY document ORDER BY min(rowid)"
        return self._database.execute(query).fetchall()

    def passages(self) -> list[Passage]:
        """All passages, oldest first."""
        return [Passage(*row) for row in self._database.execute("SELECT document, text FROM passages ORDER BY rowid")]

    def search(self, question: str, limit: int) -> list[Passage]:
        """The passages that share words with a question, by BM25, best first.

        Args:
            question: any text. Each of its words is quoted, so none is an operator of FTS5.
            limit: most passages to return.
        """
        words = dict.fromkeys(re.findall(r"\w+", question.lower()))
        if not words:
            return []
        query = "SELECT document, text FROM passages WHERE passages MATCH ? ORDER BY rank LIMIT ?"
        match = " OR ".join(f'"{word}"' for word in words)
        return [Passage(*row) for row in self._database.execute(query, (match, limit))]


def cut(text: str) -> list[str]:
    """Cut a text into passages at blank lines, each as long as possible; a heading begins a new one if it can.

    A paragraph longer than :data:`LONGEST` is cut after a sentence, or between words.
    """
    passages: list[str] = []
    for paragraph in BLANK_LINE.split(text.replace("\r\n", "\n")):
        for piece in _pieces(paragraph.strip()):
            longer = f"{passages[-1]}\n\n{piece}" if passages else piece
            new_section = piece.startswith("#") and len(longer) > LONGEST // 2
            if passages and len(longer) <= LONGEST and not new_section:
                passages[-1] = longer
            else:
                passages.append(piece)
    return passages


def _pieces(paragraph: str) -> Iterator[str]:
    while len(paragraph) > LONGEST:
        head = paragraph[:LONGEST]
        end = max(head.rfind(mark) + len(mark) if mark in head else 0 for mark in SENTENCE_ENDS)
        end = end or head.rfind(" ") + 1 or LONGEST
        yield head[:end].rstrip()
        paragraph = paragraph[end:].lstrip()
    if paragraph:
        yield paragraph
