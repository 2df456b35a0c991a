"""Selection of rows by the model of drift: one program per block conditions it, one per request picks its rows.

The greedy design of :func:`a3_sglang.drift.selection.select_a_optimal`, for several requests at once. A round takes two
launches: every block conditions its covariance on the rows that were picked in it in the round before (exactly, by as
many columns as it really has), then every request picks the rows with the largest gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import tile_width
from a3_sglang.kernels.drift_common import PIVOTS, CovarianceTable, covariance, inverse, ordered

ROWS_PER_STEP = 32
"""Rows of a block's covariance that its program changes at a time."""
CELLS_PER_STEP = 4096
"""Candidates that a request's program reads at a time."""
COLUMNS = tl.constexpr(6)
"""Of the table of blocks, see :class:`BlockTable`."""


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The blocks of several requests.

    Attributes:
        entries: of each block: its request's first row and number of rows, the block's first row and number of rows,
            the offset of its first row in the span, and how many of its rows are candidates. Rows are numbered through
            all requests.
        blocks: of each request.
    """

    entries: Sequence[tuple[int, int, int, int, int, int]]
    blocks: Sequence[int]


@triton.jit
def _candidates_kernel(
    weights,
    scales,
    blocks,
    row_of,
    offsets,
    cell_scales,
    cell_weights,
    picked_in,
    width,
    shared_sill,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Candidates of a block, its rows with the largest weight x prior variance, in ascending order. Grid: (blocks,).

    Weights are divided by the largest of the request. Cells without a candidate are marked as picked.
    """
    block = tl.program_id(0)
    entry = blocks + COLUMNS * block
    request_row, request_rows = tl.load(entry), tl.load(entry + 1)
    first_row, rows = tl.load(entry + 2), tl.load(entry + 3)
    offset, most = tl.load(entry + 4), tl.load(entry + 5)

    # Largest weight of the request.
    largest = tl.zeros((STEP,), tl.float32)
    for begin in range(0, request_rows, STEP):
        offs = begin + tl.arange(0, STEP)
        largest = tl.maximum(largest, tl.load(weights + request_row + offs, mask=offs < request_rows, other=0.0))
    unit = tl.maximum(tl.max(largest, 0), 1.1754944e-38)

    # Weight x prior variance; the threshold by bisection of its bits.
    index = tl.arange(0, SIZE)
    exists = index < rows
    weight = tl.load(weights + first_row + index, mask=exists, other=0.0) / unit
    scale = tl.load(scales + offset + index, mask=exists, other=0.0)
    key = tl.where(exists, ordered(weight * (shared_sill + (1.0 - shared_sill) * scale * scale)), -1)
    count = tl.minimum(rows, most)
    threshold, step = 0, 1 << 30
    for _ in range(31):
        enough = tl.sum((key >= threshold + step).to(tl.int32), 0) >= count
        threshold += tl.where(enough, step, 0)
        step = step // 2
    above, equal = key > threshold, key == threshold
    free = count - tl.sum(above.to(tl.int32), 0)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= free))

    # Write the candidates, then the cells that have none.
    cell = block * width + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(row_of + cell, first_row + index, mask=taken)
    tl.store(offsets + cell, offset + index, mask=taken)
    tl.store(cell_scales + cell, scale, mask=taken)
    tl.store(cell_weights + cell, weight, mask=taken)
    tl.store(picked_in + cell, 0, mask=taken)
    cell = block * width + index
    none = (index >= count) & (index < width)
    tl.store(offsets + cell, 0, mask=none)
    tl.store(cell_scales + cell, 0.0, mask=none)
    tl.store(cell_weights + cell, 0.0, mask=none)
    tl.store(picked_in + cell, -1, mask=none)
    tl.store(row_of + cell, 0, mask=none)


@triton.jit
def _store_gains(gains, matrix, i, j, mask_i, open_i, weight_i, weight_j, nugget_i):
    """Gain of rows i of a block, given their rows (i, j) of the covariance; -1 for rows that are picked."""
    variance = tl.sum(tl.where(i[:, None] == j[None, :], matrix, 0.0), 1)
    # (variance + nugget)**2 of the row itself, of which the sum over all rows has only variance**2.
    own = nugget_i * (nugget_i + 2 * variance) * weight_i
    explained = tl.sum(matrix * matrix * weight_j[None, :], 1) + own
    tl.store(gains + i, tl.where(open_i, explained / (variance + nugget_i), -1.0), mask=mask_i)


@triton.jit(do_not_specialize=["round_number"])
def _condition_kernel(
    matrices,
    gains,
    offsets,
    cell_scales,
    cell_weights,
    picked_in,
    round_number,
    width,
    shared_sill,
    shared_rate,
    local_sill,
    local_rate,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """Condition a block on its rows that were picked in round ``round_number``; gain of the others. Grid: (blocks,).

    ``FIRST``: nothing is picked yet, and the prior covariance is written.
    """
    block = tl.program_id(0)
    gains += block * width
    offsets += block * width
    cell_scales += block * width
    cell_weights += block * width
    picked_in += block * width
    matrices += block.to(tl.int64) * width * width
    nugget_sill = 1.0 - shared_sill - local_sill
    j = tl.arange(0, BLOCK_N)
    mask_j = j < width
    state_j = tl.load(picked_in + j, mask=mask_j, other=-1)
    # An observed row has no variance left, so its weight gains nothing.
    weight_j = tl.where(state_j == 0, tl.load(cell_weights + j, mask=mask_j, other=0.0), 0.0)
    if FIRST:
        offset_j = tl.load(offsets + j, mask=mask_j, other=0)
        scale_j = tl.load(cell_scales + j, mask=mask_j, other=0.0)
        for begin in range(0, width, BLOCK_M):
            i = begin + tl.arange(0, BLOCK_M)
            mask_i = i < width
            offset_i, scale_i = (
                tl.load(offsets + i, mask=mask_i, other=0),
                tl.load(cell_scales + i, mask=mask_i, other=1.0),
            )
            matrix = covariance(offset_i, offset_j, scale_i, scale_j, shared_sill, shared_rate, local_sill, local_rate)
            tl.store(matrices + i[:, None] * width + j[None, :], matrix, mask=mask_i[:, None] & mask_j[None, :])
            open_i = tl.load(picked_in + i, mask=mask_i, other=-1) == 0
            weight_i = tl.load(cell_weights + i, mask=mask_i & open_i, other=0.0)
            nugget_i = nugget_sill * scale_i * scale_i
            _store_gains(gains, matrix, i, j, mask_i, open_i, weight_i, weight_j, nugget_i)
    else:
        picked = state_j == round_number
        place = tl.where(picked, tl.cumsum(picked.to(tl.int32), 0) - 1, -1)
        count = tl.sum(picked.to(tl.int32), 0)
        pivot = tl.arange(0, PIVOTS)
        for first in range(0, count, PIVOTS):
            # Columns c of the next picked rows: S = (c, c) with nugget, R = (c, all); then matrix -= (all, c) S^-1 R.
            is_live = first + pivot < count
            c = tl.sum(tl.where(place[None, :] == (first + pivot)[:, None], j[None, :], 0), 1)
            live_cc = is_live[:, None] & is_live[None, :]
            s = tl.load(matrices + c[:, None] * width + c[None, :], mask=live_cc, other=0.0)
            scale_c = tl.load(cell_scales + c, mask=is_live, other=0.0)
            nugget_c = tl.where(is_live, nugget_sill * scale_c * scale_c, 1.0)
            s += tl.where(pivot[:, None] == pivot[None, :], nugget_c[:, None], 0.0)
            mask_cj = is_live[:, None] & mask_j[None, :]
            r = tl.load(matrices + c[:, None] * width + j[None, :], mask=mask_cj, other=0.0)
            r = tl.dot(inverse(s, PIVOTS), r, input_precision="ieee")
            # All threads must have read what the first of them overwrites.
            tl.debug_barrier()
            for begin in range(0, width, BLOCK_M):
                i = begin + tl.arange(0, BLOCK_M)
                mask_i = i < width
                mask_ic = mask_i[:, None] & is_live[None, :]
                side = tl.load(matrices + i[:, None] * width + c[None, :], mask=mask_ic, other=0.0)
                at = matrices + i[:, None] * width + j[None, :]
                mask_ij = mask_i[:, None] & mask_j[None, :]
                matrix = tl.load(at, mask=mask_ij, other=0.0)
                tl.debug_barrier()
                matrix -= tl.dot(side, r, input_precision="ieee")
                tl.store(at, matrix, mask=mask_ij)
                open_i = tl.load(picked_in + i, mask=mask_i, other=-1) == 0
                weight_i = tl.load(cell_weights + i, mask=mask_i & open_i, other=0.0)
                scale_i = tl.load(cell_scales + i, mask=mask_i, other=1.0)
                nugget_i = nugget_sill * scale_i * scale_i
                _store_gains(gains, matrix, i, j, mask_i, open_i, weight_i, weight_j, nugget_i)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["round_number"])
def _pick_kernel(gains, picked_in, row_of, selected, requests, schedule, round_number, STEP: tl.constexpr):
    """A request's rows with the largest gain, of equal ones the first, in ascending order. Grid: (requests,).

    ``schedule`` has, by round and request, where in ``selected`` the rows of the round begin, and how many they are.
    """
    request = tl.program_id(0)
    first_cell, cells = tl.load(requests + 2 * request), tl.load(requests + 2 * request + 1)
    schedule += 2 * ((round_number - 1) * tl.num_programs(0) + request)
    begin_out, count = tl.load(schedule), tl.load(schedule + 1)
    offs = tl.arange(0, STEP)
    # The threshold by bisection of its bits: the largest with at least as many gains above or at it.
    threshold, step = 0, 1 << 30
    for _ in range(31):
        enough = tl.zeros((STEP,), tl.int32)
        for begin in range(0, cells, STEP):
            gain = tl.load(gains + first_cell + begin + offs, mask=begin + offs < cells, other=-1.0)
            enough += (ordered(gain) >= threshold + step).to(tl.int32)
        threshold += tl.where(tl.sum(enough, 0) >= count, step, 0)
        step = step // 2
    above = tl.zeros((STEP,), tl.int32)
    for begin in range(0, cells, STEP):
        gain = tl.load(gains + first_cell + begin + offs, mask=begin + offs < cells, other=-1.0)
        above += (ordered(gain) > threshold).to(tl.int32)
    free, taken_before = count - tl.sum(above, 0), 0
    for begin in range(0, cells, STEP):
        cell = first_cell + begin + offs
        exists = begin + offs < cells
        key = ordered(tl.load(gains + cell, mask=exists, other=-1.0))
        equal = (key == threshold) & exists
        taken = (key > threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= free))
        place = begin_out + taken_before + tl.cumsum(taken.to(tl.int32), 0) - 1
        row = tl.load(row_of + cell, mask=taken, other=0)
        tl.store(selected + place, row.to(tl.int64), mask=taken)
        tl.store(picked_in + cell, round_number, mask=taken)
        free -= tl.minimum(free, tl.sum(equal.to(tl.int32), 0))
        taken_before += tl.sum(taken.to(tl.int32), 0)


def select_rows(
    weights: torch.Tensor,
    table: BlockTable,
    picks: Sequence[Sequence[int]],
    kind: CovarianceTable,
) -> torch.Tensor:
    """Rows of several requests whose recompute most reduces the weighted posterior variance of their drift.

    Args:
        weights: float32 (rows of all requests,), not negative.
        table: the blocks of all requests.
        picks: rows to pick of each request, by round.
        kind: covariance of the drift.

    Returns:
        int64 (sum of picks,), row numbers, request by request and round by round.
    """
    device, blocks = weights.device, len(table.entries)
    size, width = (max(entry[column] for entry in table.entries) for column in (3, 5))

    def on_device(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)

    cells = [blocks_of * width for blocks_of in table.blocks]
    first_cells = [sum(cells[:request]) for request in range(len(picks))]
    counts = [sum(by_round) for by_round in picks]
    rounds = [
        [
            (sum(counts[:request]) + sum(by_round[:i]), by_round[i]) if i < len(by_round) else (0, 0)
            for request, by_round in enumerate(picks)
        ]
        for i in range(max(map(len, picks)))
    ]
    entries, schedule = on_device(list(table.entries)), on_device(rounds)
    spans = on_device(list(zip(first_cells, cells, strict=True)))

    row_of, offsets, picked_in = torch.empty((3, blocks, width), dtype=torch.int32, device=device).unbind(0)
    cell_scales, cell_weights, gains = torch.empty((3, blocks, width), device=device).unbind(0)
    matrices = torch.empty((blocks, width, width), device=device)
    selected = torch.empty(sum(counts), dtype=torch.int64, device=device)
    _candidates_kernel[(blocks,)](
        weights,
        kind.scales,
        entries,
        row_of,
        offsets,
        cell_scales,
        cell_weights,
        picked_in,
        width,
        kind.shared_sill,
        SIZE=tile_width(size),
        STEP=CELLS_PER_STEP,
        num_warps=8,
    )
    for round_number in range(len(rounds)):
        _condition_kernel[(blocks,)](
            matrices,
            gains,
            offsets,
            cell_scales,
            cell_weights,
            picked_in,
            round_number,
            width,
            *kind.sills_and_rates,
            FIRST=not round_number,
            BLOCK_M=ROWS_PER_STEP,
            BLOCK_N=tile_width(width),
            PIVOTS=PIVOTS,
            num_warps=8,
        )
        _pick_kernel[(len(picks),)](
            gains, picked_in, row_of, selected, spans, schedule, round_number + 1, STEP=CELLS_PER_STEP, num_warps=8
        )
    return selected
