"""How the kernels of the probe divide rows and context among their programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_ROWS = 64
"""Upper bound of the probe's rows per request."""
LANES = 128
"""Rows times heads per KV head that one program attends with."""
POSITIONS = 64
"""Context positions that a program reads per step."""
PROGRAMS = 256
"""Programs that the attention of one layer is split into if there is enough context: about two per multiprocessor of a
large GPU. More would leave more pieces to merge."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which program computes what; made on the host once for all layers.

    Attributes:
        pieces: int32 (pieces, 4): first row, number of rows, first position in ``slots``, number of positions. Pieces
            of the same positions are adjacent, so that these are read from memory once.
        tiles: int32 (tiles, 6): first row, number of rows, the request's first row, then first, number and distance of
            the tile's pieces.
        blocks: int32 (blocks, 4): first position in ``slots``, number of positions, the request's first row and
            number of rows.
        slots: int64 (sum of contexts,): the requests' context slots, concatenated.
        rows: of all requests.
    """

    pieces: torch.Tensor
    tiles: torch.Tensor
    blocks: torch.Tensor
    slots: torch.Tensor
    rows: int


def make_layout(counts: Sequence[int], slots: Sequence[torch.Tensor], heads: int, kv_heads: int) -> Layout:
    """Cut the probes of several requests and their contexts; forces no host-device sync.

    Args:
        counts: probe rows of each request, at most :data:`MAX_ROWS`.
        slots: int64 (context,) of each request: the slots that all its rows attend to.
        heads: query heads, at most :data:`LANES` per KV head.
        kv_heads: KV heads.
    """
    step = LANES // (heads // kv_heads)
    work = sum(-(-count // step) * len(context) for count, context in zip(counts, slots, strict=True)) * kv_heads
    size = max(4 * POSITIONS, work // PROGRAMS // POSITIONS * POSITIONS)
    pieces: list[tuple[int, ...]] = []
    tiles: list[tuple[int, ...]] = []
    blocks: list[tuple[int, ...]] = []
    row = begin = 0
    for count, context in zip(counts, slots, strict=True):
        length = len(context)
        row_cuts, context_cuts = range(0, count, step), range(0, length, size)
        tiles += [
            (row + r, min(step, count - r), row, len(pieces) + i, len(context_cuts), len(row_cuts))
            for i, r in enumerate(row_cuts)
        ]
        pieces += [
            (row + r, min(step, count - r), begin + c, min(size, length - c)) for c in context_cuts for r in row_cuts
        ]
        blocks += [(begin + c, min(POSITIONS, length - c), row, count) for c in range(0, length, POSITIONS)]
        row, begin = row + count, begin + length

    def table(entries: list[tuple[int, ...]], width: int) -> torch.Tensor:
        return torch.tensor(entries, dtype=torch.int32).view(-1, width).to(slots[0].device, non_blocking=True)

    return Layout(table(pieces, 4), table(tiles, 6), table(blocks, 4), torch.cat(list(slots)), row)
