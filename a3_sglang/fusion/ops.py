"""What the executor does differently on a CPU and on CUDA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from a3_sglang.attention.autotune import fastest
from a3_sglang.attention.base import KV, ProbeAttention, RowAttention
from a3_sglang.attention.registry import ROW_ATTENTION, ROW_ATTENTION_NAMES
from a3_sglang.attention.torch_cpu import TorchProbeAttention, TorchRowAttention
from a3_sglang.attention.triton import TritonProbeAttention, TritonRowAttention
from a3_sglang.drift.correction import DriftCorrection, correct_drift
from a3_sglang.rope import RopeTable, Rotation, copy_rotated


class Ops(ABC):
    """The heavy parts of a fused prefill on one kind of device."""

    rows: RowAttention
    questions: ProbeAttention

    @abstractmethod
    def pools(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Any:
        """What :meth:`copy` needs to know of layers that share a rotary table.

        Args:
            keys: (slots, heads, head_dim) of each layer; they stay where they are.
            values: like ``keys``.
        """

    @abstractmethod
    def copy(self, pools: Any, source: torch.Tensor, target: torch.Tensor, turn: Rotation, neox: bool) -> None:
        """Copy KV rows between slots in all these layers, turning the keys.

        Args:
            pools: what :meth:`pools` returned.
            source: int64 (n,), slots to copy from.
            target: int64 (n,), slots to copy to; none of ``source``.
            turn: what :meth:`a3_sglang.rope.RopeTable.turn` returned for these rows.
            neox: pairing of the dimensions.
        """

    @abstractmethod
    def spread(self, pools: KV, fresh: KV, spread: DriftCorrection, rope: RopeTable) -> None:
        """See :func:`a3_sglang.drift.correction.correct_drift`."""


class TorchOps(Ops):
    """PyTorch's own operations; meant for a CPU."""

    def __init__(self) -> None:
        self.rows, self.questions = TorchRowAttention(), TorchProbeAttention()

    def pools(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Any:
        return list(zip(keys, values, strict=True))

    def copy(self, pools: Any, source: torch.Tensor, target: torch.Tensor, turn: Rotation, neox: bool) -> None:
        for keys, values in pools:
            copy_rotated(keys, values, source, target, turn, neox)

    def spread(self, pools: KV, fresh: KV, spread: DriftCorrection, rope: RopeTable) -> None:
        correct_drift(pools, fresh, spread, rope)


class TritonOps(Ops):
    """The kernels in ``kernels/``, on CUDA.

    Args:
        rows: takes the place of the kernel for row attention.
    """

    def __init__(self, rows: RowAttention | None = None) -> None:
        self.rows, self.questions = rows or TritonRowAttention(), TritonProbeAttention()

    def pools(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Any:
        # Imported here: a machine without a GPU need not have Triton.
        from a3_sglang.kernels.copy_rotated import Pools

        return Pools.of(keys, values)

    def copy(self, pools: Any, source: torch.Tensor, target: torch.Tensor, turn: Rotation, neox: bool) -> None:
        from a3_sglang.kernels.copy_rotated import copy_rotated_layers

        copy_rotated_layers(pools, source, target, turn, neox)

    def spread(self, pools: KV, fresh: KV, spread: DriftCorrection, rope: RopeTable) -> None:
        from a3_sglang.kernels.drift_correction import correct_drift

        correct_drift(
            pools,
            fresh,
            (spread.rows, spread.known, spread.real),
            spread.slots,
            (spread.drift.keys, spread.drift.values),
            (spread.drift.source, spread.drift.number),
            spread.turns(rope),
            rope.neox,
        )


def create_ops(pool: torch.Tensor, heads: int, layers: int, row_attention: str) -> Ops:
    """How fusions run where the KV lies.

    Args:
        pool: (slots, kv_heads, head_dim), a layer's keys.
        heads: query heads of a layer.
        layers: of the model.
        row_attention: a name in :data:`ROW_ATTENTION_NAMES`, or "auto" for the fastest that is right.

    Raises:
        ValueError: there is no such row attention here, or it gives wrong results.
    """
    if not pool.is_cuda:
        if row_attention != "auto":
            raise ValueError(f"row_attention={row_attention} needs a CUDA device; leave it at auto")
        return TorchOps()
    names = ROW_ATTENTION_NAMES if row_attention == "auto" else (row_attention,)
    candidates = {name: partial(ROW_ATTENTION[name], pool.device) for name in names}
    return TritonOps(fastest(candidates, heads, pool, layers))
