"""The model as the fusion needs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from a3_sglang.rope import RopeTable


class UnsupportedModelError(ValueError):
    """The model or its configuration cannot be fused; the message is one line that says what and why."""


class StopForward(Exception):  # noqa: N818 - no error
    """Raised by :meth:`AttentionHook.attend` where nothing behind it is wanted; ends the pass."""


class AttentionHook(ABC):
    """What happens where a layer of the model attends."""

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of a pass's rows at one layer.

        Args:
            layer: the layer's number.
            query: (rows, heads, head_dim), after RoPE.
            key: (rows, kv_heads, head_dim), the rows' own, after RoPE.
            value: like ``key``.
            scaling: factor of the logits.

        Returns:
            (rows, heads, head_dim).

        Raises:
            StopForward: no layer behind this one is wanted.
        """


class Model(ABC):
    """The model as the executor needs it: a pool of KV slots and passes over arbitrary rows."""

    depth: int
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    ropes: Mapping[int, RopeTable]

    @abstractmethod
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        """Run rows through the layers, until ``attend`` raises :class:`StopForward` or to the end.

        Args:
            tokens: int64 (rows,).
            positions: int64 (rows,).
            attend: takes the place of the model's attention.
        """

    @abstractmethod
    def extend(self, tokens: torch.Tensor, positions: torch.Tensor) -> Any:
        """The model's own forward of rows, head included, as of a batch's tails; within :meth:`extended`.

        Args:
            tokens: int64 (rows,).
            positions: int64 (rows,).
        """

    @abstractmethod
    def extended(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook
    ) -> AbstractContextManager[None]:
        """A context for the model's own forward of other rows: it attends through ``attend``, and these rows go first.

        Args:
            tokens: int64 (rows,), may be none.
            positions: int64 (rows,).
            attend: takes the place of the model's attention.

        Raises:
            RuntimeError: at the end, if no forward took the rows along.
        """
