"""Formatting of documents in prompts. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable


def documents(texts: Iterable[str]) -> str:
    """Join documents for a prompt so that each is tokenized the same way at any position and its KV can be reused.

    A blank line follows each document; tokenizers do not merge it with the text before or after it.
    """
    return "".join(f"{text.strip()}\n\n" for text in texts)
