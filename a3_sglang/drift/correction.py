"""Takes the drift that recomputed rows show off the reused rows between them; see ``drift/model.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from a3_sglang.attention.base import KV
from a3_sglang.drift.model import DriftPredictor
from a3_sglang.rope import RopeTable, Rotation, rotate


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
