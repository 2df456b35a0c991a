"""An open-addressing hash table over numpy arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from a3_sglang.matching.hashing import Hashes

Numbers = npt.NDArray[np.int32]
"""Numbers of blocks."""


class HashTable:
    """Open-addressing hash table from 64-bit hashes to the newest block with that hash.

    Stores int32 block numbers only; the hashes themselves are in the caller's array. Batch operations are vectorized
    over the keys.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._buckets = np.full(capacity, -1, np.int32)
        self._used = 0

    def get(self, keys: Hashes, hashes: Hashes) -> Numbers:
        """Newest block of each key, -1 if there is none; (n,) -> (n,)."""
        found = np.full(len(keys), -1, np.int32)
        mask = len(self._buckets) - 1
        pending = np.arange(len(keys))
        at = self._home(keys)
        while len(pending):
            block = self._buckets[at]
            occupied = block >= 0
            same = occupied & (hashes[block] == keys[pending])
            found[pending[same]] = block[same]
            further = occupied & ~same
            pending, at = pending[further], (at[further] + 1) & mask
        return found

    def put(self, keys: Hashes, blocks: Numbers, hashes: Hashes) -> None:
        """Map each key to its block, in place of an older block of the same key. Keys are distinct."""
        while (self._used + len(keys)) * 2 > len(self._buckets):
            self._grow(hashes)
        mask = len(self._buckets) - 1
        pending = np.arange(len(keys))
        at = self._home(keys)
        while len(pending):
            # Two keys may want the same free bucket in this round: the last write wins, the others probe further.
            block = self._buckets[at]
            replaces = (block >= 0) & (hashes[block] == keys[pending])
            free = block < 0
            self._buckets[at[free]] = blocks[pending[free]]
            self._buckets[at[replaces]] = blocks[pending[replaces]]
            won = self._buckets[at] == blocks[pending]
            self._used += int((won & free).sum())
            pending, at = pending[~won], (at[~won] + 1) & mask

    def _grow(self, hashes: Hashes) -> None:
        kept = self._buckets[self._buckets >= 0]
        self._buckets = np.full(len(self._buckets) * 2, -1, np.int32)
        self._used = 0
        if len(kept):
            self.put(hashes[kept], kept, hashes)

    def _home(self, keys: Hashes) -> npt.NDArray[np.int64]:
        mask = np.uint64(len(self._buckets) - 1)
        return ((keys ^ (keys >> np.uint64(29))) & mask).astype(np.int64)
