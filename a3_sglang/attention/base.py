"""What an attention backend implements: attention of recomputed rows, and of the probe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RequestRows:
    """Rows of one request within a batch of rows.

    Attributes:
        begin, end: the request's rows in the batch.
        slots: int64 (n,), KV slots of the whole prompt by ascending position; those no row sees may be any.
        visible: int64 (end - begin,), ascending: how many of ``slots`` each row sees.
        exact: no KV of the request is approximate, so rows should round as in a full prefill where kernels allow.
    """

    begin: int
    end: int
    slots: torch.Tensor
    visible: torch.Tensor
    exact: bool


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Attention of a pass's rows at one layer: ``(query, keys, values, scaling) -> out``.

``query`` and ``out`` are (rows, heads, head_dim) of one dtype, ``keys`` and ``values`` (slots, kv_heads, head_dim) with
the rows' own already written; ``scaling`` multiplies the logits.
"""


class RowAttention(ABC):
    """How rows attend; one implementation for each kind of device."""

    @abstractmethod
    def plan(self, groups: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> Attention:
        """Prepare a pass, once for all layers.

        Args:
            groups: who owns which rows; together they cover all rows in order.
            heads: query heads of a layer.
            kv_heads: KV heads of a layer.
            dtype: of query, keys and values.
        """


@dataclass(frozen=True, slots=True)
class ProbeRows:
    """Rows of one request within a batch of rows.

    Attributes:
        begin, end: the request's rows in the batch.
        known: int64 (context,), slots of the positions that all its rows see.
    """

    begin: int
    end: int
    known: torch.Tensor


KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""

ProbeFn = Callable[[torch.Tensor, KV, KV, float, torch.Tensor | None], torch.Tensor]
"""Attention of all rows at one layer: ``(query, own, pools, scaling, scores) -> out``.

``query`` and ``out`` are (rows, heads, head_dim); ``own`` the rows' keys and values, each (rows, kv_heads, head_dim),
which get no slots; ``pools`` those of the layer, each (slots, kv_heads, head_dim). A row sees its request's known
context and its request's rows up to itself. To ``scores``, float32 (sum of contexts,), is added what each known
position gives to its question (:func:`a3_sglang.attention.relevance.relevance`); None: that is not wanted.
"""


class ProbeAttention(ABC):
    """How questions attend; one implementation for each kind of device."""

    @abstractmethod
    def plan(self, questions: Sequence[ProbeRows], heads: int, kv_heads: int) -> ProbeFn:
        """Prepare a pass, once for all layers.

        Args:
            questions: who owns which rows; together they cover all rows in order.
            heads: query heads of a layer.
            kv_heads: KV heads of a layer.
        """
