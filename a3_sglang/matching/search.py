"""The search of one prompt for runs of donors, cached across the prompt's scheduling rounds."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from a3_sglang.matching.hashing import Hashes
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.run import Run, runs_from
from a3_sglang.matching.segment import Ids
from a3_sglang.matching.sweep import CachedLength, Sweep


class PromptSearch:
    """Searches an index for one prompt, again only if what was found is gone or something relevant was indexed.

    Args:
        index: the donors.
        namespace: of the prompt.
        tokens: of the prompt.
    """

    def __init__(self, index: AnyPositionIndex, namespace: Hashable, tokens: Ids) -> None:
        self._index, self._namespace, self._prompt = index, namespace, np.asarray(tokens, np.int32)
        self._runs: list[Run] = []
        # What the last search was for, and which blocks the index had then.
        self._start, self._shortest, self._generation, self._count = 0, 0, -1, 0
        self._uncovered: Hashes | None = None
        self.searches = 0
        """How often the index was searched."""

    def runs(self, start: int, min_span: int | None = None, cached_length: CachedLength | None = None) -> list[Run]:
        """Disjoint runs of the prompt after ``start``, ascending by prompt position.

        Args:
            start: tokens that come from elsewhere, usually an exact prefix.
            min_span: tokens of the shortest run; the index's if that is larger.
            cached_length: see :class:`Sweep`.
        """
        index = self._index
        shortest = max(min_span or index.min_span, index.min_span)
        if len(self._prompt) - start < shortest:
            return []
        if self._outdated(start, shortest):
            windows = index.hasher.window_hashes(self._namespace, self._prompt)
            sweep = Sweep(index, self._namespace, self._prompt, windows, start, shortest, cached_length)
            self._runs = sweep.run()
            self._start, self._shortest, self._uncovered = start, shortest, None
            self._generation, self._count = index.blocks.generation, index.blocks.count
            self.searches += 1
        return list(runs_from(self._runs, start, shortest))

    def _outdated(self, start: int, shortest: int) -> bool:
        index, blocks = self._index, self._index.blocks
        if self._generation != blocks.generation or self._shortest != shortest or start < self._start:
            return True
        if not all(index.holds(run) for run in self._runs):
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
        """Hashes, ascending, of the windows that are neither within a run nor before the start of the search."""
        windows = self._index.hasher.window_hashes(self._namespace, self._prompt)
        uncovered = np.ones(len(windows), np.bool_)
        uncovered[: self._start] = False
        for run in self._runs:
            uncovered[run.start : run.end - self._index.block + 1] = False
        return np.unique(windows[uncovered])


def find_runs(
    index: AnyPositionIndex,
    namespace: Hashable,
    tokens: Ids,
    start: int = 0,
    min_span: int | None = None,
    cached_length: CachedLength | None = None,
) -> list[Run]:
    """What :meth:`PromptSearch.runs` finds in a prompt that is searched only once."""
    return PromptSearch(index, namespace, tokens).runs(start, min_span, cached_length)
