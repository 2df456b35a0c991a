"""Approximate KV in SGLang's own tree: how its paths are keyed, and where they leave exact ones.

A path with approximate KV has the prompt's own tokens as long as its KV is exact; from there on
(:attr:`Branch.begin`) each token id has the branch's generation and kind in its upper 32 bits. No prompt holds such
ids, so a plain match never enters the branch; otherwise the tree treats its nodes like all others: it shares, locks,
evicts and counts them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from a3_sglang.matching.hashing import beginning_hashes

GENERATIONS = 4
"""Approximate KV is made of donors of a lower generation, so that of the last one is no donor."""
KINDS = (1 << 30) // (GENERATIONS + 1)
"""Kinds are below this, so that ids stay positive in 64 bits."""
_SHIFT = 32
_CAPACITY = 4096


@dataclass(frozen=True, slots=True)
class Branch:
    """Where a path's KV becomes approximate.

    Attributes:
        begin: its first approximate position.
        generation: 1 or more: one more than the highest of the donors that its KV was made of.
        kind: tells apart what must not be shared: other ratios and selectors; with compiled donors also other prompts.
    """

    begin: int
    generation: int
    kind: int = 0

    @property
    def _code(self) -> int:
        return (self.kind * (GENERATIONS + 1) + self.generation) << _SHIFT

    def mark(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The ids under which the tree holds a path's tokens; int64 (n,) -> (n,)."""
        marked = tokens.copy()
        marked[self.begin :] += self._code
        return marked

    def tokens(self, marked: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens of ids that :meth:`mark` returned."""
        return marked & ((1 << _SHIFT) - 1)


class Branches:
    """The branches that were entered into the tree, by the tokens that a prompt must have to find them.

    Args:
        capacity: branches that are remembered; those used longest ago are forgotten.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._branch: list[Branch | None] = [None] * self._capacity
        self._row: dict[tuple[int, int, Branch], int] = {}
        # Rows: length and hash of the tokens, and when the branch was last used (0: an empty row).
        self._length = np.zeros(self._capacity, np.int64)
        self._hash = np.zeros(self._capacity, np.uint64)
        self._used = np.zeros(self._capacity, np.int64)
        self._clock = 0

    def __len__(self) -> int:
        return len(self._row)

    def add(self, hashes: npt.NDArray[np.uint64], length: int, branch: Branch) -> None:
        """Remember a branch, for prompts that begin with the same ``length`` tokens.

        Args:
            hashes: :func:`prefix_hashes` of the path.
            length: tokens that a prompt has to share.
            branch: what it finds.
        """
        key = (length, int(hashes[length]), branch)
        row = self._row.get(key)
        if row is None:
            row = int(self._used.argmin())
            if self._used[row]:
                self._forget(row)
            self._row[key], self._branch[row] = row, branch
            self._length[row], self._hash[row] = length, hashes[length]
        self._touch(row)

    def find(self, hashes: npt.NDArray[np.uint64], most: int) -> list[Branch]:
        """Branches whose tokens a prompt begins with, those used last first.

        Args:
            hashes: :func:`prefix_hashes` of the prompt.
            most: how many at most.
        """
        rows = np.flatnonzero((self._used > 0) & (self._length < len(hashes)))
        rows = rows[hashes[self._length[rows]] == self._hash[rows]]
        rows = rows[np.argsort(-self._used[rows], kind="stable")][:most]
        found = [self._branch[int(row)] for row in rows]
        return [branch for branch in found if branch is not None]

    def _forget(self, row: int) -> None:
        branch = self._branch[row]
        assert branch is not None
        del self._row[int(self._length[row]), int(self._hash[row]), branch]
        self._branch[row], self._used[row] = None, 0

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._used[row] = self._clock


def prefix_hashes(seed: Hashable, tokens: Any) -> npt.NDArray[np.uint64]:
    """Hash of each of a prompt's beginnings, from none of its tokens to all of them; uint64 (n + 1,).

    Args:
        seed: what prompts have to have in common beside tokens.
        tokens: of the prompt.
    """
    return beginning_hashes(seed, np.asarray(tokens, np.uint64))
