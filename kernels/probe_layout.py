"""How the kernels of the probe divide rows and context among their programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a3_sglang.kernels.common import tile_width

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
        requests: int32 (requests, 5): a request's first block of :data:`POSITIONS` context positions, its first
            position in ``slots``, number of positions, first row and number of rows.
        blocks: of all requests.
        slots: int64 (sum of contexts,): the requests' context slots, concatenated.
        context_pos: int64 (sum of contexts,): their positions.
        row_pos: int64 (rows,): positions of the rows.
    """

    pieces: torch.Tensor
    tiles: torch.Tensor
    requests: torch.Tensor
    blocks: int
    slots: torch.Tensor
    context_pos: torch.Tensor
    row_pos: torch.Tensor

    @property
    def rows(self) -> int:
        """Of all requests."""
        return len(self.row_pos)


def make_layout(
    slots: Sequence[torch.Tensor],
    context_pos: Sequence[torch.Tensor],
    row_pos: Sequence[torch.Tensor],
    heads: int,
    kv_heads: int,
) -> Layout:
    """Cut the probes of several requests and their contexts; forces no host-device sync.

    Args:
        slots: int64 (context,) of each request: the slots that all its rows attend to, apart from windows.
        context_pos: int64 (context,) of each request: their positions, ascending.
        row_pos: int64 (probe rows,) of each request: positions of its rows, ascending, after those of the context; at
            most :data:`MAX_ROWS`.
        heads: query heads, at most :data:`LANES` per KV head.
        kv_heads: KV heads.
    """
    step, counts = LANES // (heads // kv_heads), [len(rows) for rows in row_pos]
    work = sum(-(-count // step) * len(context) for count, context in zip(counts, slots, strict=True)) * kv_heads
    size = max(4 * POSITIONS, work // PROGRAMS // POSITIONS * POSITIONS)
    pieces: list[tuple[int, ...]] = []
    tiles: list[tuple[int, ...]] = []
    requests: list[tuple[int, ...]] = []
    row = begin = block = 0
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
        requests.append((block, begin, length, row, count))
        row, begin, block = row + count, begin + length, block + -(-length // POSITIONS)

    def table(entries: list[tuple[int, ...]], width: int) -> torch.Tensor:
        return torch.tensor(entries, dtype=torch.int32).view(-1, width).to(slots[0].device, non_blocking=True)

    joined = (torch.cat(list(parts)) for parts in (slots, context_pos, row_pos))
    return Layout(table(pieces, 4), table(tiles, 6), table(requests, 5), block, *joined)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the kernels of one layer hand to each other; made once and used by all layers.

    Attributes:
        acc: float32 (pieces, kv_heads, LANES, tile width of head_dim), partial outputs.
        m_i, l_i: float32 (pieces, kv_heads, LANES), their maxima and sums.
        value_norms: float32 (kv_heads, sum of contexts).
        lse: float32 (heads, rows), log2 of each row's sum of exponentials.
    """

    acc: torch.Tensor
    m_i: torch.Tensor
    l_i: torch.Tensor
    value_norms: torch.Tensor
    lse: torch.Tensor


def make_scratch(layout: Layout, heads: int, kv_heads: int, dim: int) -> Scratch:
    """Memory for :func:`a3_sglang.kernels.probe_attention.probe_attention` with this layout, for equal layers."""
    states, device = (len(layout.pieces), kv_heads, LANES), layout.slots.device
    return Scratch(
        torch.empty((*states, tile_width(dim)), device=device),
        torch.empty(states, device=device),
        torch.empty(states, device=device),
        torch.empty((kv_heads, len(layout.slots)), device=device),
        torch.empty((heads, layout.rows), device=device),
    )
