"""What an attention backend implements: attention of arbitrary rows, and the attention of the probe.

Either is planned once per pass, on the host, and then run once per layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from a3_sglang.kernels.attention_spec import AttentionSpec as AttentionSpec

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The rows of one request in a pass.

    Attributes:
        begin, end: the request's first row of the pass, and the row after its last.
        slots: int64 (n,), KV slots of the whole prompt by position; arbitrary after the longest of ``kv_lens``.
        kv_lens: int64 (end - begin,), ascending: how many of ``slots`` each row attends to.
        exact: no KV of the request is approximate, so rows should round as in a full prefill if the backend can.
    """

    begin: int
    end: int
    slots: torch.Tensor
    kv_lens: torch.Tensor
    exact: bool


RowAttentionFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec], torch.Tensor]
"""Attention of a pass's rows at one layer: ``(query, keys, values, spec) -> out``.

``query`` and ``out`` are (rows, heads, head_dim) of one dtype; ``keys`` and ``values`` (slots, kv_heads, head_dim)
already hold the KV of the rows themselves; ``spec`` says how the layer attends.
"""


class RowAttention(ABC):
    """Attention of arbitrary rows over paged KV: each row attends to its own request up to its own position."""

    @abstractmethod
    def plan(self, requests: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
        """Plan one pass, for all layers at once.

        Args:
            requests: together they cover all rows of the pass, in order.
            heads: query heads per layer.
            kv_heads: KV heads per layer.
            dtype: of query, keys and values.
        """


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """The rows of one request in a probe.

    Attributes:
        begin, end: the request's first row of the probe, and the row after its last.
        context_slots: int64 (context,), slots of the positions that all its rows attend to.
        context_pos: int64 (context,), these positions, ascending.
        row_pos: int64 (end - begin,), positions of its rows, ascending, after those of the context.
    """

    begin: int
    end: int
    context_slots: torch.Tensor
    context_pos: torch.Tensor
    row_pos: torch.Tensor

    @classmethod
    def after(cls, context_slots: torch.Tensor, rows: int) -> ProbeRows:
        """A pass of one probe, right after a context without gaps."""
        positions = torch.arange(len(context_slots) + rows, device=context_slots.device)
        context_pos, row_pos = positions.tensor_split([len(context_slots)])
        return cls(0, rows, context_slots, context_pos, row_pos)


ProbeFn = Callable[[torch.Tensor, KV, KV, AttentionSpec, torch.Tensor | None], torch.Tensor]
"""Attention of a probe's rows at one layer: ``(query, own, pools, spec, scores) -> out``.

``query`` and ``out`` are (rows, heads, head_dim); ``own`` the rows' keys and values, each (rows, kv_heads, head_dim),
which get no slots; ``pools`` those of the layer, each (slots, kv_heads, head_dim). A row attends to the context of its
request and to the request's rows up to itself, as far back as the layer's window. The relevance of each context
position (:func:`a3_sglang.attention.relevance.relevance`) is added to ``scores``, float32 (sum of contexts,), unless it
is None.
"""


class ProbeAttention(ABC):
    """Attention of the probe, and the relevance of each context position to it."""

    @abstractmethod
    def plan(self, requests: Sequence[ProbeRows], heads: int, kv_heads: int, mean: bool = False) -> ProbeFn:
        """Plan one pass, for all layers at once.

        Args:
            requests: together they cover all rows of the probe, in order.
            heads: query heads per layer.
            kv_heads: KV heads per layer.
            mean: which relevance is measured, see :func:`a3_sglang.attention.relevance.relevance`.
        """
