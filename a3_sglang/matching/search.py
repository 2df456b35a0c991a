"""The search of one prompt for spans of donors; results are cached while the prompt waits to be scheduled."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from a3_sglang.matching.hashing import Hashes
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.segment import Ids
from a3_sglang.matching.span import Span, spans_from
from a3_sglang.matching.sweep import CachedLength, Sweep


class PromptSearch:
    """Searches an index for one prompt; repeats the search only if a span is gone or a relevant donor was added.

    Args:
        index: the donors.
        namespace: of the prompt.
        tokens: of the prompt.
    """

    def __init__(self, index: AnyPositionIndex, namespace: Hashable, tokens: Ids) -> None:
        self._index, self._namespace, self._prompt = index, namespace, np.asarray(tokens, np.int32)
        self._spans: list[Span] = []
        # What the last search was for, and which blocks the index had then.
        self._start, self._min_span, self._generation, self._count = 0, 0, -1, 0
        self._uncovered: Hashes | None = None
        self.searches = 0
        """How often the index was searched."""

    def spans(self, start: int, min_span: int | None = None, cached_length: CachedLength | None = None) -> list[Span]:
        """Disjoint spans of the prompt after ``start``, ascending by prompt position.

        Args:
            start: prompt position from which to search; the end of the exact prefix.
            min_span: tokens of the shortest span; the index's if that is larger.
            cached_length: see :class:`Sweep`.
        """
        index = self._index
        min_span = max(min_span or index.min_span, index.min_span)
        if len(self._prompt) - start < min_span:
            return []
        if self._outdated(start, min_span):
            windows = index.hasher.window_hashes(self._namespace, self._prompt)
            sweep = Sweep(index, self._namespace, self._prompt, windows, start, min_span, cached_length)
            self._spans = sweep.run()
            self._start, self._min_span, self._uncovered = start, min_span, None
            self._generation, self._count = index.blocks.generation, index.blocks.count
            self.searches += 1
        return list(spans_from(self._spans, start, min_span))

    def _outdated(self, start: int, min_span: int) -> bool:
        index, blocks = self._index, self._index.blocks
        if self._generation != blocks.generation or self._min_span != min_span or start < self._start:
            return True
        if not all(index.holds(span) for span in self._spans):
            return True
        new = blocks.content[self._count : blocks.count]
        if not len(new):
            return False
        self._count += len(new)
        if self._uncovered is None:
            self._uncovered = self._hash_uncovered()
        if not len(self._uncovered):
            return False
        nearest = np.searchsorted(self._uncovered, new).clip(max=len(self._uncovered) - 1)
        return bool((self._uncovered[nearest] == new).any())

    def _hash_uncovered(self) -> Hashes:
        """Hashes, ascending, of the windows that are neither within a span nor before the start of the search."""
        windows = self._index.hasher.window_hashes(self._namespace, self._prompt)
        uncovered = np.ones(len(windows), np.bool_)
        uncovered[: self._start] = False
        for span in self._spans:
            uncovered[span.start : span.end - self._index.block + 1] = False
        return np.unique(windows[uncovered])


def find_spans(
    index: AnyPositionIndex,
    namespace: Hashable,
    tokens: Ids,
    start: int = 0,
    min_span: int | None = None,
    cached_length: CachedLength | None = None,
) -> list[Span]:
    """Search a prompt once; see :meth:`PromptSearch.spans`."""
    return PromptSearch(index, namespace, tokens).spans(start, min_span, cached_length)
