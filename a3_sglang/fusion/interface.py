"""The interface between a fusion and the model it runs on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from a3_sglang.attention.base import AttentionSpec
from a3_sglang.drift.model import DEFAULT, DriftModel
from a3_sglang.rope import RopeTable


class UnsupportedModelError(ValueError):
    """The model or its configuration cannot be fused; the message is one line that says what and why."""


class StopForward(Exception):  # noqa: N818 - no error
    """Raised by :meth:`AttentionHook.attend` to end the pass at this layer."""


class AttentionHook(ABC):
    """Replaces the model's attention during a forward pass."""

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        """Attention of a pass's rows at one layer.

        Args:
            layer: the layer's number.
            query: (rows, heads, head_dim), after RoPE.
            key: (rows, kv_heads, head_dim), the rows' own, after RoPE.
            value: like ``key``.
            spec: how the layer attends.

        Returns:
            (rows, heads, head_dim).

        Raises:
            StopForward: neither this layer's output nor any later layer is needed.
        """


class Model(ABC):
    """The model as the executor needs it: a pool of KV slots, and forward passes on arbitrary rows.

    Attributes:
        depth: number of layers.
        keys, values: the KV pool of each layer, (slots, kv_heads, head_dim).
        ropes: rotary table by layer; layers may share one.
        windows: how many positions before its own a row attends to, by layer; None: to all of them.
        drift: how the drift of its copied KV varies.
    """

    depth: int
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    ropes: Mapping[int, RopeTable]
    windows: Sequence[int | None]
    drift: DriftModel = DEFAULT

    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the KV of rows to the pool.

        Args:
            layer: the layer's number.
            slots: int64 (rows,), at least one, all different.
            key: (rows, kv_heads, head_dim), after RoPE.
            value: like ``key``.
        """
        for pool, own in ((self.keys[layer], key), (self.values[layer], value)):
            pool.index_copy_(0, slots, own.to(pool.dtype))

    @abstractmethod
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        """Run rows through the layers to the end, or until ``attend`` raises :class:`StopForward`.

        Args:
            tokens: int64 (rows,).
            positions: int64 (rows,).
            attend: replaces the model's attention.
        """

    @abstractmethod
    def extend(self, tokens: torch.Tensor, positions: torch.Tensor) -> Any:
        """The model's own forward of rows, head included, as of a batch's tails; within :meth:`prepending`.

        Args:
            tokens: int64 (rows,).
            positions: int64 (rows,).
        """

    @abstractmethod
    def prepending(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook
    ) -> AbstractContextManager[None]:
        """A context for one forward of the model, which runs these rows before its own and attends through ``attend``.

        Args:
            tokens: int64 (rows,), may be empty.
            positions: int64 (rows,).
            attend: replaces the model's attention, for all rows.

        Raises:
            RuntimeError: on exit, if the rows did not run exactly once.
        """
