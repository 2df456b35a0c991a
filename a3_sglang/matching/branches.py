"""Branches: how paths with approximate KV are keyed in SGLang's own tree.

As long as its KV is exact, such a path has the prompt's own token ids. From :attr:`Branch.begin` on, each id has the
branch's generation and kind in its upper 32 bits. No prompt contains such ids, so a plain match never enters a branch.
Otherwise the tree treats a branch's nodes like all others: it shares, locks, evicts and counts them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from a3_sglang.matching.hashing import beginning_hashes

GENERATIONS = 4
"""Highest generation. KV is made only from donors of lower generations, so KV of this one is never a donor."""
KINDS = (1 << 30) // (GENERATIONS + 1)
"""Number of kinds, few enough that ids stay positive in 64 bits."""
_SHIFT = 32
_CAPACITY = 4096


@dataclass(frozen=True, slots=True)
class Branch:
    """The approximate part of a path.

    Attributes:
        begin: first prompt position with approximate KV.
        generation: one more than the highest generation of the donors that its KV was made from (0: exact KV).
        kind: distinguishes branches that must not be shared: of other ratios and selectors, and if donors are compiled
            also of other prompts.
    """

    begin: int
    generation: int
    kind: int = 0

    @property
    def _code(self) -> int:
        return (self.kind * (GENERATIONS + 1) + self.generation) << _SHIFT

    def mark(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The ids by which the tree stores a path's tokens; int64 (n,) -> (n,)."""
        marked = tokens.copy()
        marked[self.begin :] += self._code
        return marked

    def tokens(self, marked: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The inverse of :meth:`mark`; int64 (n,) -> (n,)."""
        return marked & ((1 << _SHIFT) - 1)


def generation_of(mark: Hashable) -> int:
    """The generation of a donor's KV, by the mark that the index has of it: 0 if its KV is exact."""
    return mark.generation if isinstance(mark, Branch) else 0


class Branches:
    """The branches in the tree, by the tokens that a prompt must begin with to find them.

    Args:
        capacity: number of branches; beyond it, the least recently used are forgotten.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._branch: list[Branch | None] = [None] * self._capacity
        self._entry: dict[tuple[int, int, Branch], int] = {}
        # Per entry: length and hash of the tokens, and when the branch was last used (0: an empty entry).
        self._length = np.zeros(self._capacity, np.int64)
        self._hash = np.zeros(self._capacity, np.uint64)
        self._used = np.zeros(self._capacity, np.int64)
        self._clock = 0

    def __len__(self) -> int:
        return len(self._entry)

    def add(self, hashes: npt.NDArray[np.uint64], length: int, branch: Branch) -> None:
        """Remember a branch for prompts that begin with the same ``length`` tokens.

        Args:
            hashes: :func:`prefix_hashes` of the path, uint64 (n + 1,).
            length: tokens that a prompt has to share with the path.
            branch: of the path.
        """
        key = (length, int(hashes[length]), branch)
        entry = self._entry.get(key)
        if entry is None:
            entry = int(self._used.argmin())
            if self._used[entry]:
                self._forget(entry)
            self._entry[key], self._branch[entry] = entry, branch
            self._length[entry], self._hash[entry] = length, hashes[length]
        self._touch(entry)

    def find(self, hashes: npt.NDArray[np.uint64], limit: int) -> list[Branch]:
        """Branches whose tokens a prompt begins with, most recently used first.

        Args:
            hashes: :func:`prefix_hashes` of the prompt, uint64 (n + 1,).
            limit: maximum number of branches.
        """
        entries = np.flatnonzero((self._used > 0) & (self._length < len(hashes)))
        entries = entries[hashes[self._length[entries]] == self._hash[entries]]
        entries = entries[np.argsort(-self._used[entries], kind="stable")][:limit]
        found = [self._branch[int(entry)] for entry in entries]
        return [branch for branch in found if branch is not None]

    def _forget(self, entry: int) -> None:
        branch = self._branch[entry]
        assert branch is not None
        del self._entry[int(self._length[entry]), int(self._hash[entry]), branch]
        self._branch[entry], self._used[entry] = None, 0

    def _touch(self, entry: int) -> None:
        self._clock += 1
        self._used[entry] = self._clock


def prefix_hashes(seed: Hashable, tokens: Any) -> npt.NDArray[np.uint64]:
    """Hash of each beginning of a prompt, from the empty one to the whole; uint64 (n + 1,).

    Args:
        seed: prompts with other seeds have other hashes.
        tokens: of the prompt.
    """
    return beginning_hashes(seed, np.asarray(tokens, np.uint64))
