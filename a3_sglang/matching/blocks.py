"""The hash blocks of all donors."""

from __future__ import annotations

import numpy as np

from a3_sglang.matching.hash_table import HashTable, Numbers
from a3_sglang.matching.hashing import Hashes

_DEAD_ROUNDS = 64
"""Maximum number of dead blocks that a search skips before it gives up on a content hash."""


class BlockStore:
    """Blocks by number, in the order in which they were indexed, as one array per attribute.

    Attributes:
        content: uint64, hash of the block's own tokens.
        chain: uint64, hash of all blocks of the path up to this one.
        owner: int32, number of the segment it belongs to.
        ordinal: int32, index of the block within its segment.
        older: int32, the next older block of the same content, -1 if there is none.
        live: bool, False once its donor was forgotten.
        count: blocks indexed since the last :meth:`clear`, dead ones included.
        generation: grows whenever block numbers lose their meaning.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.clear()

    def clear(self) -> None:
        """Drop all blocks; their numbers will be reused."""
        self.content, self.chain = np.zeros(64, np.uint64), np.zeros(64, np.uint64)
        self.owner, self.ordinal, self.older = (np.zeros(64, np.int32) for _ in range(3))
        self.live = np.zeros(64, np.bool_)
        self.count = self._dead = 0
        self._by_content, self._by_chain = HashTable(), HashTable()
        self.generation += 1

    @property
    def mostly_dead(self) -> bool:
        return self._dead > 1024 and self._dead * 2 > self.count

    def add(self, owner: int, ordinal: int, content: Hashes, chain: Hashes) -> int:
        """Index consecutive blocks of a segment and return the number of the first.

        Args:
            owner: number of the segment.
            ordinal: index of the first of these blocks within the segment.
            content: hash of each block's tokens, uint64 (n,), n at least 1.
            chain: hash of each block's path, uint64 (n,).
        """
        first, n = self.count, len(content)
        end = first + n
        self._reserve(end)
        new = np.arange(first, end, dtype=np.int32)
        self.content[first:end] = content
        self.chain[first:end] = chain
        self.owner[first:end] = owner
        self.ordinal[first:end] = ordinal + np.arange(n)
        self.live[first:end] = True
        self.count = end
        # Blocks of equal content form a list, newest first. Of equal blocks within one path only two are listed, so
        # that one repeated token does not fill a list: the first, because a span that starts there covers the others,
        # and the last, because other tokens follow it.
        self.older[first:end] = -1
        _, earliest = np.unique(content, return_index=True)
        _, latest = np.unique(content[::-1], return_index=True)
        latest = n - 1 - latest
        for listed in (earliest, latest[latest != earliest]):
            self.older[new[listed]] = self._by_content.get(content[listed], self.content)
            self._by_content.put(content[listed], new[listed], self.content)
        self._by_chain.put(chain, new, self.chain)
        return first

    def kill(self, first: int, end: int) -> None:
        """Mark the living blocks ``[first, end)`` as dead."""
        self.live[first:end] = False
        self._dead += end - first

    def with_chain(self, chain: Hashes) -> Numbers:
        """The newest block of each path hash, -1 if there is none; (n,) -> (n,)."""
        return self._by_chain.get(chain, self.chain)

    def newest_living(self, content: Hashes) -> tuple[Numbers, int]:
        """The newest living block of each content, and how many dead ones were skipped.

        Dead blocks at the head of a list are taken out of it.

        Args:
            content: hashes, uint64 (n,).

        Returns:
            Block numbers, int32 (n,), -1 if there is none; and the number of skipped blocks.
        """
        heads = self._by_content.get(content, self.content)
        hits = np.flatnonzero(heads >= 0)
        if self.live[heads[hits]].all():
            return heads, 0
        first, inverse = np.unique(heads[hits], return_inverse=True)
        living, skipped = first.copy(), 0
        for _ in range(_DEAD_ROUNDS):
            dead = np.flatnonzero(living >= 0)
            dead = dead[~self.live[living[dead]]]
            if not len(dead):
                break
            skipped += len(dead)
            living[dead] = self.older[living[dead]]
        living[(living >= 0) & ~self.live[living]] = -1
        moved = living[(living >= 0) & (living != first)]
        if len(moved):
            self._by_content.put(self.content[moved], moved, self.content)
        heads[hits] = living[inverse]
        return heads, skipped

    def _reserve(self, n: int) -> None:
        if n <= len(self.content):
            return
        size = max(n, len(self.content) * 5 // 4)
        for name in ("content", "chain", "owner", "ordinal", "older", "live"):
            old = getattr(self, name)
            grown = np.zeros(size, old.dtype)
            grown[: self.count] = old[: self.count]
            setattr(self, name, grown)
