"""The heavy operations of a fused prefill, on a CPU and on CUDA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from a3_sglang.attention.autotune import fastest
from a3_sglang.attention.base import KV, ProbeAttention, RowAttention
from a3_sglang.attention.registry import ROW_ATTENTION, VARIANTS
from a3_sglang.attention.torch_cpu import TorchProbeAttention, TorchRowAttention
from a3_sglang.attention.triton import TritonProbeAttention, TritonRowAttention
from a3_sglang.drift.batched import BatchedCorrection
from a3_sglang.drift.correction import DriftCorrection, DriftCorrectionFn, ObservedRows, correct_drift
from a3_sglang.drift.model import DriftModel
from a3_sglang.rope import RopeTable, Rotation, copy_rotated


class Ops(ABC):
    """The operations on one kind of device."""

    row_attention: RowAttention
    probe_attention: ProbeAttention

    @abstractmethod
    def pools(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Any:
        """The handle by which :meth:`copy` reaches the layers that share a rotary table.

        Args:
            keys: (slots, heads, head_dim) of each layer; these tensors must not be moved or replaced.
            values: like ``keys``.
        """

    @abstractmethod
    def copy(self, pools: Any, source: torch.Tensor, target: torch.Tensor, rotation: Rotation, neox: bool) -> None:
        """Copy KV rows between slots in all these layers, rotating the keys.

        Args:
            pools: from :meth:`pools`.
            source: int64 (n,), slots to copy from.
            target: int64 (n,), slots to copy to; none of ``source``.
            rotation: of these rows, from :meth:`a3_sglang.rope.RopeTable.rotation`.
            neox: pairing of the dimensions.
        """

    @abstractmethod
    def plan_drift_correction(
        self, drift: DriftModel, observed: Sequence[ObservedRows], dtype: torch.dtype
    ) -> DriftCorrectionFn:
        """Plan the correction of drift in one pass, for all layers at once.

        Args:
            drift: how the drift of rows varies.
            observed: the rows of each request whose drift is observed, at least one request.
            dtype: of the KV pools.
        """


class TorchOps(Ops):
    """PyTorch's own operations; meant for a CPU."""

    def __init__(self) -> None:
        self.row_attention, self.probe_attention = TorchRowAttention(), TorchProbeAttention()

    def pools(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Any:
        return list(zip(keys, values, strict=True))

    def copy(self, pools: Any, source: torch.Tensor, target: torch.Tensor, rotation: Rotation, neox: bool) -> None:
        for keys, values in pools:
            copy_rotated(keys, values, source, target, rotation, neox)

    def plan_drift_correction(
        self, drift: DriftModel, observed: Sequence[ObservedRows], dtype: torch.dtype
    ) -> DriftCorrectionFn:
        corrections = [DriftCorrection.plan(drift, part) for part in observed]

        def correct(pools: KV, fresh: KV, rope: RopeTable) -> None:
            for correction in corrections:
                correct_drift(pools, fresh, correction, rope)

        return correct


class TritonOps(Ops):
    """The kernels in ``kernels/``, on CUDA; imported when called, as a machine without a GPU need not have Triton.

    Args:
        row_attention: replaces the kernel for row attention.
    """

    def __init__(self, row_attention: RowAttention | None = None) -> None:
        self.row_attention, self.probe_attention = row_attention or TritonRowAttention(), TritonProbeAttention()

    def pools(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Any:
        from a3_sglang.kernels.copy_rotated import Pools

        return Pools.of(keys, values)

    def copy(self, pools: Any, source: torch.Tensor, target: torch.Tensor, rotation: Rotation, neox: bool) -> None:
        from a3_sglang.kernels.copy_rotated import copy_rotated_layers

        copy_rotated_layers(pools, source, target, rotation, neox)

    def plan_drift_correction(
        self, drift: DriftModel, observed: Sequence[ObservedRows], dtype: torch.dtype
    ) -> DriftCorrectionFn:
        return BatchedCorrection(drift, observed, dtype)


def create_ops(pool: torch.Tensor, heads: int, layers: int, row_attention: str) -> Ops:
    """The operations for the device of the KV.

    Args:
        pool: (slots, kv_heads, head_dim), a layer's keys.
        heads: query heads per layer.
        layers: of the model.
        row_attention: a name in :data:`a3_sglang.attention.registry.ROW_ATTENTION`, or "auto" for the fastest
            that is right.

    Raises:
        ValueError: the device has no such row attention, or it gives wrong results.
    """
    if not pool.is_cuda:
        if row_attention != "auto":
            raise ValueError(f"row_attention={row_attention} needs a CUDA device; leave it at auto")
        return TorchOps()
    tried = ROW_ATTENTION | VARIANTS if row_attention == "auto" else {row_attention: ROW_ATTENTION[row_attention]}
    candidates = {name: partial(make, pool.device) for name, make in tried.items()}
    return TritonOps(fastest(candidates, heads, pool, layers))
