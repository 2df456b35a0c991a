"""Tokens as text, and the search for a prompt's tokens in other texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from a3_sglang.matching.segment import common_prefix

_INCOMPLETE = "\ufffd"


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the text of all.

    If several tokens make up one character, the last one has it and the text of the others is empty.
    """
    found: list[str] = []
    begin = read = 0
    for end in range(1, len(ids) + 1):
        # Decoded together with the token before, because tokenizers treat the first token of a text differently.
        known, text = (_decode(tokenizer, ids[begin:to]) for to in (read, end))
        if text.endswith(_INCOMPLETE) and end < len(ids):
            found.append("")
            continue
        found.append(text[len(known) :])
        begin, read = read, end
    return found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


class Place(NamedTuple):
    """A position in one of several texts, given by its index."""

    text: int
    position: int


def longest_prefix(ids: Sequence[int], texts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Index of the text with the longest common prefix, and its length in tokens; ``(-1, 0)`` if there is none."""
    lengths = [common_prefix(np.asarray(ids), np.asarray(text)) for text in texts]
    best = int(np.argmax(lengths)) if lengths else -1
    return (best, lengths[best]) if best >= 0 and lengths[best] else (-1, 0)


def find(ids: Sequence[int], start: int, end: int, offset: int, texts: Sequence[Sequence[int]]) -> Place | None:
    """Find the tokens ``[start, end)`` of a prompt in one of several texts; None if no text contains them.

    Args:
        ids: tokens of the prompt.
        start: first position to search for.
        end: end of the positions to search for.
        offset: position in the donor, as the server reports it. A match at this position is preferred, then the one
            with the most equal tokens around it.
        texts: tokens of each text.
    """
    prompt, best, most = np.asarray(ids), None, (False, 0)
    wanted = prompt[start:end]
    for number, text in enumerate(np.asarray(one) for one in texts):
        last = len(text) - len(wanted)
        for at in np.flatnonzero(text[: last + 1] == wanted[0]) if last >= 0 else ():
            if not np.array_equal(text[at : at + len(wanted)], wanted):
                continue
            around = common_prefix(prompt[:start][::-1], text[:at][::-1]) + common_prefix(
                prompt[end:], text[at + len(wanted) :]
            )
            if best is None or (at == offset, around) > most:
                best, most = Place(number, int(at)), (bool(at == offset), around)
    return best
