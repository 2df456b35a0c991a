"""64-bit hashes of windows, blocks and beginnings of token sequences."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from a3_sglang.matching.segment import Tokens

Hashes = npt.NDArray[np.uint64]
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class BlockHasher:
    """Polynomial hashes of ``block`` consecutive tokens.

    Args:
        block: tokens per hash.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        powers = np.empty(block, np.uint64)
        powers[0] = 1
        with np.errstate(over="ignore"):
            for i in range(1, block):
                powers[i] = powers[i - 1] * _MULTIPLIER
        self._powers = powers

    def block_hashes(self, namespace: Hashable, blocks: Tokens) -> Hashes:
        """Hash of each block; int32 (n, block) -> uint64 (n,)."""
        with np.errstate(over="ignore"):
            value = np.full(len(blocks), _hash(namespace), np.uint64)
            for j in range(self.block):
                value += (blocks[:, j].astype(np.uint64) + np.uint64(1)) * self._powers[j]
            return _mix(value)

    def window_hashes(self, namespace: Hashable, tokens: Tokens) -> Hashes:
        """Hash of every window of ``block`` tokens, stride 1; int32 (n,) -> uint64 (n - block + 1,)."""
        if len(tokens) < self.block:
            return np.empty(0, np.uint64)
        return self.block_hashes(namespace, np.lib.stride_tricks.sliding_window_view(tokens, self.block))


def beginning_hashes(seed: Hashable, items: Hashes) -> Hashes:
    """Hash of each beginning of a sequence, from the empty one to the whole; uint64 (n,) -> (n + 1,).

    Sums of the items, each mixed with its index, so that the order counts.
    """
    with np.errstate(over="ignore"):
        index = np.arange(1, len(items) + 1, dtype=np.uint64) * _MULTIPLIER
        sums = np.cumsum(_mix(items ^ index), dtype=np.uint64)
        return _mix(np.append(np.uint64(0), sums) + _hash(seed))


def _hash(value: Hashable) -> np.uint64:
    return np.uint64(hash(value) & 0xFFFFFFFFFFFFFFFF)


def _mix(x: Hashes) -> Hashes:
    """The finalizer of SplitMix64, elementwise."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
