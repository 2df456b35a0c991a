"""Tokens as text, and where tokens of one prompt are in others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_INCOMPLETE = "\ufffd"


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the text of all.

    Of tokens that make up one character, the last one has it and the others have none.
    """
    found: list[str] = []
    begin = read = 0
    for end in range(1, len(ids) + 1):
        # One token before is decoded along, as tokenizers treat the first of a text in a way of their own.
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
    """A position in one of several texts."""

    text: int
    position: int


def common_prefix(ids: Sequence[int], texts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Which of the texts shares most of its beginning with a prompt, and how many tokens; ``(-1, 0)`` if none does."""
    lengths = [_equal(np.asarray(ids), np.asarray(text)) for text in texts]
    best = int(np.argmax(lengths)) if lengths else -1
    return (best, lengths[best]) if best >= 0 and lengths[best] else (-1, 0)


def find(ids: Sequence[int], start: int, end: int, offset: int, texts: Sequence[Sequence[int]]) -> Place | None:
    """Where some of the texts has the tokens ``[start, end)`` of a prompt.

    Args:
        ids: tokens of the prompt.
        start: of what is searched for.
        end: of what is searched for.
        offset: where the server says its donor has them; such a place is preferred, then one with more in common
            around it.
        texts: tokens of each.
    """
    prompt, best, most = np.asarray(ids), None, (False, 0)
    wanted = prompt[start:end]
    for number, text in enumerate(np.asarray(one) for one in texts):
        last = len(text) - len(wanted)
        for at in np.flatnonzero(text[: last + 1] == wanted[0]) if last >= 0 else ():
            if not np.array_equal(text[at : at + len(wanted)], wanted):
                continue
            around = _equal(prompt[:start][::-1], text[:at][::-1]) + _equal(prompt[end:], text[at + len(wanted) :])
            if best is None or (at == offset, around) > most:
                best, most = Place(number, int(at)), (bool(at == offset), around)
    return best


def _equal(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int:
    """How many tokens at the beginning of two texts are equal."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
