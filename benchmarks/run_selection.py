"""Which runs of neighbouring rows to recompute, by the model of drift in ``a3_sglang/drift/model.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a3_sglang.drift.model import Covariance, DriftModel, PaddedBlocks
from a3_sglang.drift.selection import candidates_per_block


def select_runs(
    drift: DriftModel,
    weight: torch.Tensor,
    blocks: PaddedBlocks,
    count: int,
    lengths: Sequence[int],
    overhead: float = 0.0,
) -> torch.Tensor:
    """Pick the runs of rows whose recompute most reduces the weighted posterior variance of the drift of keys.

    The greedy A-optimal design of :func:`a3_sglang.drift.selection.select_a_optimal` with whole runs as candidates: the
    gain of a run is that of observing all its rows at once, ``sum_j weight[j] (cov(j, run) cov(run, run)^-1 cov(run,
    j))``, conditioned on the runs picked before. The run with the largest gain per cost comes next. A run costs its new
    rows, plus ``overhead`` unless it continues a run picked before.

    Args:
        drift: how the drift of the rows varies.
        weight: float32 (reused,), not negative; how much a row's drift matters.
        blocks: of the reused rows; rows of different blocks are independent, and no run leaves its block.
        count: rows to pick, at most ``reused``; the last run is cut to fit.
        lengths: of the candidates, each at least 1.
        overhead: cost of a run besides its rows, in rows.

    Returns:
        int64 (count,), ordinals among the reused rows, in the order in which they were picked.
    """
    weights = blocks.pad(weight / weight.max().clamp(min=torch.finfo(weight.dtype).tiny), 0)
    ordinals = blocks.pad(torch.arange(len(weight), device=weight.device), -1)
    most = candidates_per_block(blocks, count)
    designs = [
        _Design(drift.keys, w, own[own >= 0], offsets, lengths, overhead, most)
        for w, own, offsets in zip(weights, ordinals, blocks.offsets, strict=True)
    ]
    picked: list[torch.Tensor] = []
    while count:
        best = max(designs, key=lambda design: design.rate)
        rows = best.pick(count)
        picked.append(rows)
        count -= len(rows)
    return torch.cat([ordinals.new_empty(0), *picked])


class _Design:
    """The runs picked in one block, and the best of those that could be picked next.

    Args:
        keys: covariance of the drift of keys.
        weight: float32 (size,); entries after the last row are ignored.
        ordinals: int64 (n,), of the block's rows.
        offsets: int64 (size,), of the rows from the beginning of their span.
        lengths, overhead: of the candidates.
        most: rows that may be picked.

    Attributes:
        rate: largest gain per cost of any run; negative if no row may be picked any more.
    """

    def __init__(
        self,
        keys: Covariance,
        weight: torch.Tensor,
        ordinals: torch.Tensor,
        offsets: torch.Tensor,
        lengths: Sequence[int],
        overhead: float,
        most: int,
    ) -> None:
        rows = len(ordinals)
        self._ordinals, self._weight, offsets = ordinals, weight[:rows], offsets[:rows]
        self._covariance = keys(offsets, offsets) + keys.nugget(offsets).diag()
        self._picked = torch.zeros(rows, dtype=torch.bool, device=weight.device)
        self._overhead, self._room = overhead, min(most, rows)
        # A block shorter than a run is a candidate as a whole.
        self._lengths = torch.tensor(sorted({min(length, rows) for length in lengths}), device=weight.device)
        self._windows = _Windows.of(rows, int(self._lengths[-1]), weight.device)
        self.rate, self._best = -1.0, (0, 0)
        self._update()

    def pick(self, most: int) -> torch.Tensor:
        """Pick the best run, but no more than ``most`` rows of it; ordinals of the rows that are new."""
        begin, length = self._best
        new = begin + (~self._picked[begin : begin + length]).nonzero()[: min(most, self._room), 0]
        cross = self._covariance[new]
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(cross[:, new]), cross, upper=False)
        self._covariance -= half.T @ half
        self._picked[new] = True
        self._room -= len(new)
        self._update()
        return self._ordinals[new]

    def _update(self) -> None:
        if not self._room:
            self.rate = -1.0
            return
        gain, cost = self._gain(), self._cost()
        rate = (gain / cost.clamp(min=1)).masked_fill((cost == 0) | ~self._windows.fits, -1)[:, self._lengths - 1]
        best = int(rate.argmax())
        start, length = divmod(best, len(self._lengths))
        self.rate, self._best = float(rate.flatten()[best]), (start, int(self._lengths[length]))

    def _gain(self) -> torch.Tensor:
        """Of the run of each length at each start, float32 (starts, longest).

        With G the covariance times the weights times the covariance, the gain of a run is the trace of ``cov(run,
        run)^-1 G(run, run)``. The factor of a window has those of its beginnings in it, so partial sums of the diagonal
        are the gains of all shorter runs.
        """
        rows, columns = self._windows.index[:, :, None], self._windows.index[:, None]
        weighted = (self._covariance * self._weight) @ self._covariance
        known = self._picked[self._windows.index] | ~self._windows.fits
        unknown = ~(known[:, :, None] | known[:, None])
        among, explained = (matrix[rows, columns] * unknown for matrix in (self._covariance, weighted))
        among.diagonal(dim1=1, dim2=2).masked_fill_(known, 1)
        factor = torch.linalg.cholesky(among)
        half = torch.linalg.solve_triangular(factor, explained, upper=False)
        whole = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        return whole.diagonal(dim1=1, dim2=2).cumsum(1)

    def _cost(self) -> torch.Tensor:
        """Of the run of each length at each start, float32 (starts, longest); zero if it has no new row."""
        picked = self._picked
        new = (~picked[self._windows.index]).cumsum(1)
        before = torch.cat([picked.new_zeros(1), picked[:-1]])
        # Runs that begin at each row or before it; those that begin within a candidate, or right after it, join it.
        begun = torch.cat([torch.zeros(1, device=picked.device), (picked & ~before).cumsum(0)])
        begun = torch.cat([begun, begun[-1:]])
        joined = begun[self._windows.index + 2] - begun[: len(picked), None]
        more_runs = ((~before).float()[:, None] - joined).clamp(min=0)
        return (new + self._overhead * more_runs).masked_fill(new == 0, 0)


@dataclass(frozen=True, slots=True)
class _Windows:
    """The longest candidate at every row of a block.

    Attributes:
        index: int64 (starts, longest), rows of each window; the last row in place of those after it.
        fits: bool (starts, longest), whether the window is in the block up to this row.
    """

    index: torch.Tensor
    fits: torch.Tensor

    @classmethod
    def of(cls, rows: int, longest: int, device: torch.device) -> _Windows:
        index = torch.arange(rows, device=device)[:, None] + torch.arange(longest, device=device)
        return cls(index.clamp(max=rows - 1), index < rows)
