"""Takes the drift that recomputed rows show off the reused rows between them; see ``drift/model.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from a3_sglang.attention.base import KV
from a3_sglang.drift.model import KEYS, VALUES, Covariance, PaddedBlocks, cholesky_factor, known_first
from a3_sglang.rope import RopeTable, Rotation, rotate


class DriftPredictor:
    """Predicts the drift of all rows of some spans from that of a few.

    Args:
        known: int64 (n,), ascending numbers of the recomputed rows; ``len(blocks.place)`` stands for none of the rows.
        blocks: of all rows.
        most: how many rows of a block are known at most.
        wanted: bool (rows,), which rows are predicted at all.

    Attributes:
        keys, values: float32 (blocks, size, width), what each row takes from its block's known ones.
        source: int64 (blocks, width), which of ``known`` these are; any where the weights are zero.
        number: int64 (blocks, size), the rows' numbers, -1 where there is none.
    """

    def __init__(
        self, known: torch.Tensor, blocks: PaddedBlocks, most: int, wanted: torch.Tensor | None = None
    ) -> None:
        self._place, count = blocks.place, len(blocks.place)
        numbers = torch.arange(count + 1, device=known.device)
        mask = torch.zeros_like(numbers, dtype=torch.bool).index_fill_(0, known, True)
        columns, real = known_first(blocks.spread(mask[:count], False), most)
        order = torch.zeros_like(numbers).index_copy_(0, known, torch.arange(len(known), device=known.device))
        self.source = blocks.spread(order[:count], 0).gather(1, columns)
        self.number = blocks.spread(numbers[:count], -1)
        self.keys, self.values = (_weights(kind, columns, real, blocks.offsets) for kind in (KEYS, VALUES))
        if wanted is not None:
            unwanted = ~blocks.spread(wanted, False)[..., None]
            self.keys, self.values = (weights.masked_fill(unwanted, 0) for weights in (self.keys, self.values))

    def of_keys(self, drift: torch.Tensor) -> torch.Tensor:
        """Predicted drift of all rows, (rows, heads, head_dim), from the known rows' (n, heads, head_dim).

        In the dtype of ``drift``. Zero in blocks where nothing is known; of the known rows it is not their own.
        """
        return self._predict(drift, self.keys)

    def of_values(self, drift: torch.Tensor) -> torch.Tensor:
        """Like :meth:`of_keys`."""
        return self._predict(drift, self.values)

    def _predict(self, drift: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not len(drift):
            return drift.new_zeros(len(self._place), *drift.shape[1:])
        predicted = torch.bmm(weights.to(drift.dtype), drift.flatten(1)[self.source])
        return predicted.flatten(0, 1).index_select(0, self._place).view(-1, *drift.shape[1:])


def _weights(kind: Covariance, columns: torch.Tensor, real: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Weights that predict every row of a block from its known ones, float32 (blocks, size, known)."""
    known = offsets.gather(1, columns)
    among = kind(known, known) * (real[:, :, None] & real[:, None, :])
    toward = kind(known, offsets) * real[..., None]
    factor = cholesky_factor(among, kind.own(known), real)
    # Two batched solves: on CUDA `cholesky_solve` takes one block after the other.
    half = torch.linalg.solve_triangular(factor, toward, upper=False)
    return kind.trust * torch.linalg.solve_triangular(factor.mT, half, upper=True).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class DriftCorrection:
    """What the rows of one request tell in one pass, and whom.

    Attributes:
        drift: predicts all reused rows of the request from the pass's rows.
        rows: int64 (n,), the request's rows in the pass.
        known: int64 (n,), their slots, which still hold what was copied.
        told: int64 (n,), their positions.
        real: bool (n,), which of them are reused rows; the others tell nothing.
        slots: int64 (reused,), of all reused rows.
        positions: int64 (reused,), of all reused rows.
    """

    drift: DriftPredictor
    rows: torch.Tensor
    known: torch.Tensor
    told: torch.Tensor
    real: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    _turns: dict[int, tuple[Rotation, Rotation]] = field(default_factory=dict)

    def turns(self, rope: RopeTable) -> tuple[Rotation, Rotation]:
        """From the positions of the pass's rows to none, and from none to those of the reused rows."""
        if id(rope) not in self._turns:
            back = rope.turn(self.told, torch.zeros_like(self.told))
            self._turns[id(rope)] = back, rope.turn(torch.zeros_like(self.positions), self.positions)
        return self._turns[id(rope)]


def correct_drift(pools: KV, fresh: KV, spread: DriftCorrection, rope: RopeTable) -> None:
    """Correct one layer's reused rows in place, those of the pass (which are written afterwards) among them.

    Args:
        pools: of the layer, each (slots, kv_heads, head_dim).
        fresh: KV of the pass's rows, each (rows, kv_heads, head_dim), keys after RoPE.
        spread: who tells whom.
        rope: of the layer.
    """
    (keys, values), (key, value), none = pools, fresh, ~spread.real[:, None, None]
    back, forth = spread.turns(rope)
    seen = rotate(_drift(key, keys, spread).masked_fill_(none, 0), *back, rope.neox).to(keys.dtype)
    _add(keys, spread.slots, rotate(spread.drift.of_keys(seen).float(), *forth, rope.neox))
    seen = _drift(value, values, spread).masked_fill_(none, 0).to(values.dtype)
    _add(values, spread.slots, spread.drift.of_values(seen))


def _drift(fresh: torch.Tensor, pool: torch.Tensor, spread: DriftCorrection) -> torch.Tensor:
    return fresh.index_select(0, spread.rows).float() - pool.index_select(0, spread.known)


def _add(pool: torch.Tensor, slots: torch.Tensor, change: torch.Tensor) -> None:
    pool.index_copy_(0, slots, (pool.index_select(0, slots) + change).to(pool.dtype))
