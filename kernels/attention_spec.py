"""How a layer attends; needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """How a layer attends, besides being causal.

    Attributes:
        scaling: factor of the logits.
        window: a row attends to this many positions before its own; None: to all of them.
        logit_cap: logits become ``cap * tanh(logits / cap)``; 0: they are not capped.
        sinks: (heads,), a logit per head that takes part in the softmax and has no value; None: there is none.
    """

    scaling: float
    window: int | None = None
    logit_cap: float = 0.0
    sinks: torch.Tensor | None = None

    def sinks_by_kv_head(self, kv_heads: int) -> Sequence[torch.Tensor | None]:
        """The sinks of the heads that share each KV head, (group,) each; None if the layer has none."""
        return [None] * kv_heads if self.sinks is None else self.sinks.view(kv_heads, -1).unbind(0)
