"""Corrects the reused rows between recomputed ones by their predicted drift; the model is in ``drift/model.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from a3_sglang.attention.base import KV
from a3_sglang.drift.model import Covariance, DriftModel, PaddedBlocks, cholesky_factor, observed_first
from a3_sglang.drift.selection import candidates_per_block
from a3_sglang.rope import RopeTable, Rotation, rotate

DriftCorrectionFn = Callable[[KV, KV, RopeTable], None]
"""Corrects one layer's reused rows in place: ``(pools, fresh, rope)``.

``pools`` are those of the layer, each (slots, kv_heads, head_dim); ``fresh`` is the KV of the pass's rows, each (rows,
kv_heads, head_dim), keys after RoPE. The pass's own rows are corrected, too; they are overwritten afterwards.
"""


@dataclass(frozen=True, slots=True)
class ObservedRows:
    """The rows of one request in a pass, whose drift is observed there, and which reused rows it corrects.

    Attributes:
        spans: first position of each span and position after its last, ascending.
        reused_pos: int64 (reused,), positions of all reused rows.
        slots: int64 (context,), slots of the request by position.
        pos: int64 (n,), ascending positions of the request's rows in the pass, gaps included.
        first_row: the first of them in the pass.
        recomputed: how many reused rows the request recomputes in all.
        begin_pos: first position that is corrected; may be known on the device only.
        end_pos: position after the last, like ``begin_pos``.
    """

    spans: Sequence[tuple[int, int]]
    reused_pos: torch.Tensor
    slots: torch.Tensor
    pos: torch.Tensor
    first_row: int
    recomputed: int
    begin_pos: int | torch.Tensor
    end_pos: int | torch.Tensor

    @property
    def lengths(self) -> list[int]:
        """Rows of each span."""
        return [end - start for start, end in self.spans]


class DriftPredictor:
    """Predicts the drift of all reused rows of a request from that of the rows observed in one pass.

    Args:
        drift: how the drift of the rows varies.
        observed_idx: int64 (n,), ascending: ordinal among the reused rows of each row of the pass; for gap rows, which
            are not observed, the number of reused rows.
        blocks: of the reused rows.
        most: upper bound of the observed rows per block.
        wanted: bool (reused,), which rows are predicted at all; by default all of them.

    Attributes:
        key_weights, value_weights: float32 (blocks, size, width), contiguous: how much of each of the block's observed
            rows goes into the prediction of each row; zero in columns without an observed row.
        observed_rows: int64 (blocks, width), which of the n rows these columns are; arbitrary if the weights are zero.
    """

    def __init__(
        self,
        drift: DriftModel,
        observed_idx: torch.Tensor,
        blocks: PaddedBlocks,
        most: int,
        wanted: torch.Tensor | None = None,
    ) -> None:
        self._cell, count = blocks.cell, len(blocks.cell)
        # One more than there are reused rows: the last entry takes the rows that are not reused.
        ordinals = torch.arange(count + 1, device=observed_idx.device)
        mask = torch.zeros_like(ordinals, dtype=torch.bool).index_fill_(0, observed_idx, True)
        columns, is_observed = observed_first(blocks.pad(mask[:count], False), most)
        rows = torch.arange(len(observed_idx), device=observed_idx.device)
        order = torch.zeros_like(ordinals).index_copy_(0, observed_idx, rows)
        self.observed_rows = blocks.pad(order[:count], 0).gather(1, columns)
        self.key_weights, self.value_weights = (
            _kriging_weights(kind, columns, is_observed, blocks.offsets) for kind in (drift.keys, drift.values)
        )
        if wanted is not None:
            unwanted = ~blocks.pad(wanted, False)[..., None]
            self.key_weights, self.value_weights = (
                weights.masked_fill(unwanted, 0) for weights in (self.key_weights, self.value_weights)
            )

    def predict_keys(self, drift: torch.Tensor) -> torch.Tensor:
        """Predicted drift of all reused rows' keys at position 0.

        Args:
            drift: (n, heads, head_dim), any float dtype, of the rows of the pass.

        Returns:
            (reused, heads, head_dim) in the dtype of ``drift``; zero in blocks without an observed row. For an observed
            row it is the prediction, too, not its own drift.
        """
        return self._predict(drift, self.key_weights)

    def predict_values(self, drift: torch.Tensor) -> torch.Tensor:
        """Like :meth:`predict_keys`, of values."""
        return self._predict(drift, self.value_weights)

    def _predict(self, drift: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not len(drift):
            return drift.new_zeros(len(self._cell), *drift.shape[1:])
        predicted = torch.bmm(weights.to(drift.dtype), drift.flatten(1)[self.observed_rows])
        return predicted.flatten(0, 1).index_select(0, self._cell).view(-1, *drift.shape[1:])


def _kriging_weights(
    kind: Covariance, columns: torch.Tensor, is_observed: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Weights that predict every row of a block from its observed ones, float32 (blocks, size, width)."""
    observed = offsets.gather(1, columns)
    among = kind(observed, observed) * (is_observed[:, :, None] & is_observed[:, None, :])
    cross = kind(observed, offsets) * is_observed[..., None]
    factor = cholesky_factor(among, kind.nugget(observed), is_observed)
    # Two batched solves: on CUDA `cholesky_solve` solves one block at a time.
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    return kind.damping * torch.linalg.solve_triangular(factor.mT, half, upper=True).transpose(1, 2)


class DriftRotations:
    """Rotations of keys to position 0 and back, made once per rotary table.

    Args:
        observed_pos: int64 (n,), positions of the rows whose drift is observed.
        reused_pos: int64 (reused,), positions of the rows that are corrected.
    """

    def __init__(self, observed_pos: torch.Tensor, reused_pos: torch.Tensor) -> None:
        self._observed_pos, self._reused_pos = observed_pos, reused_pos
        self._made: dict[int, tuple[Rotation, Rotation]] = {}

    def __call__(self, rope: RopeTable) -> tuple[Rotation, Rotation]:
        """Rotations that take observed keys to position 0, and predicted drift from position 0 to each reused row."""
        if id(rope) not in self._made:
            to_zero = rope.rotation(self._observed_pos, torch.zeros_like(self._observed_pos))
            from_zero = rope.rotation(torch.zeros_like(self._reused_pos), self._reused_pos)
            self._made[id(rope)] = to_zero, from_zero
        return self._made[id(rope)]


@dataclass(frozen=True, slots=True)
class DriftCorrection:
    """Which rows of a request are observed in one pass, and which reused rows are corrected from them.

    Attributes:
        predictor: predicts all reused rows of the request from the pass's rows.
        observed_rows: int64 (n,), the request's rows in the pass.
        observed_slots: int64 (n,), their slots, which still hold the copied KV.
        is_reused: bool (n,), whether they are reused rows; the others have no drift.
        reused_slots: int64 (reused,), slots of all reused rows.
        rotations: of the keys of both.
    """

    predictor: DriftPredictor
    observed_rows: torch.Tensor
    observed_slots: torch.Tensor
    is_reused: torch.Tensor
    reused_slots: torch.Tensor
    rotations: DriftRotations

    @classmethod
    def plan(cls, drift: DriftModel, observed: ObservedRows) -> DriftCorrection:
        """Prepare the correction of one request in a pass; forces no host-device sync."""
        pos, reused_pos = observed.pos, observed.reused_pos
        blocks = PaddedBlocks(observed.lengths, pos.device)
        reused_idx = torch.searchsorted(reused_pos, pos)
        is_reused = reused_pos[reused_idx.clamp(max=len(reused_pos) - 1)] == pos
        wanted = (reused_pos >= observed.begin_pos) & (reused_pos < observed.end_pos)
        observed_idx = reused_idx.where(is_reused, len(reused_pos))
        return cls(
            DriftPredictor(drift, observed_idx, blocks, candidates_per_block(blocks, observed.recomputed), wanted),
            torch.arange(observed.first_row, observed.first_row + len(pos), device=pos.device),
            observed.slots[pos],
            is_reused,
            observed.slots[reused_pos],
            DriftRotations(pos, reused_pos),
        )


def correct_drift(pools: KV, fresh: KV, correction: DriftCorrection, rope: RopeTable) -> None:
    """Correct one layer's reused rows in place, including the pass's own rows, which are overwritten afterwards.

    Args:
        pools: of the layer, each (slots, kv_heads, head_dim).
        fresh: KV of the pass's rows, each (rows, kv_heads, head_dim), keys after RoPE.
        correction: which rows are observed and which are corrected.
        rope: of the layer.
    """
    (keys, values), (key, value) = pools, fresh
    is_gap = ~correction.is_reused[:, None, None]
    to_zero, from_zero = correction.rotations(rope)
    drift = rotate(_drift(key, keys, correction).masked_fill_(is_gap, 0), *to_zero, rope.neox).to(keys.dtype)
    predicted = rotate(correction.predictor.predict_keys(drift).float(), *from_zero, rope.neox)
    _add(keys, correction.reused_slots, predicted)
    drift = _drift(value, values, correction).masked_fill_(is_gap, 0).to(values.dtype)
    _add(values, correction.reused_slots, correction.predictor.predict_values(drift))


def _drift(fresh: torch.Tensor, pool: torch.Tensor, correction: DriftCorrection) -> torch.Tensor:
    fresh_rows = fresh.index_select(0, correction.observed_rows).float()
    return fresh_rows - pool.index_select(0, correction.observed_slots)


def _add(pool: torch.Tensor, slots: torch.Tensor, change: torch.Tensor) -> None:
    pool.index_copy_(0, slots, (pool.index_select(0, slots) + change).to(pool.dtype))
