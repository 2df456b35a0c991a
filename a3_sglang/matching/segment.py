"""Segments: the trie of donors that the any-position index keeps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


@dataclass(eq=False, slots=True)
class Segment:
    """The part of a donor's path that no earlier donor has.

    Attributes:
        namespace: of the tokens; equal tokens of other namespaces are other tokens.
        parent: the segment that this one branches off; None for the root of a namespace, which has no tokens.
        begin: position of the first token in the donor's path; a multiple of the unit.
        tokens: int32, whole pages.
        children: segments that branch off, by position and the content hashes of the blocks of their first unit.
        number: unique in its index; -1 for roots.
        blocks: ``(first block, count)`` ranges of its blocks in the index's :class:`BlockStore`, in order.
        mark: the donor's, as given to :meth:`AnyPositionIndex.add`.
    """

    namespace: Hashable
    parent: Segment | None
    begin: int
    tokens: Tokens
    children: dict[tuple[int, bytes], Segment] = field(default_factory=dict)
    number: int = -1
    blocks: list[tuple[int, int]] = field(default_factory=list)
    mark: Hashable = None

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)

    def path(self, end: int, begin: int = 0) -> Tokens:
        """Tokens ``[begin, end)`` of the donor's path, int32."""
        parts: list[Tokens] = [self.tokens[:0]]
        node: Segment | None = self
        while node is not None and begin < end:
            parts.append(node.tokens[max(begin - node.begin, 0) : max(end - node.begin, 0)])
            end = min(end, node.begin)
            node = node.parent
        return np.concatenate(parts[::-1])


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Number of leading tokens that both have in common."""
    n = min(len(a), len(b))
    if not n:
        return 0
    differ = a[:n] != b[:n]
    first = int(differ.argmax())
    return first if differ[first] else n


def starts_with(tokens: Tokens, beginning: Tokens) -> bool:
    return len(tokens) >= len(beginning) and bool((tokens[: len(beginning)] == beginning).all())
