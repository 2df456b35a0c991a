"""Random inputs at the sizes of one layer of Llama-3.1-8B, and their attention in float64."""

from __future__ import annotations

import math

import torch

from a3_sglang.attention.base import AttentionSpec
from a3_sglang.drift.correction import ObservedRows
from a3_sglang.rope import RopeTable, Rotation
from gpu_suite.card import DEVICE, DTYPE

HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 32
PROBE_ROWS = 64
TOLERANCE = 1e-2
"""Relative error of bf16 kernels against float64."""


class Case:
    """Random pools, a prompt in random slots, and rows of it that are recomputed.

    Args:
        context: tokens of the prompt.
        share: of its rows that are recomputed.
        layers: pools.
        seed: of everything that is random.
        first_slot: slots before this one exist and are empty.
    """

    def __init__(self, context: int, share: float, layers: int = 1, seed: int = 0, first_slot: int = 0) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        slots = 2 * context + PROBE_ROWS

        def pool() -> torch.Tensor:
            made = torch.empty(first_slot + slots, KV_HEADS, DIM, device=DEVICE, dtype=DTYPE)
            made[first_slot:] = torch.randn(slots, KV_HEADS, DIM, device=DEVICE, generator=generator)
            return made

        self.keys, self.values = ([pool() for _ in range(layers)] for _ in "kv")
        order = first_slot + torch.randperm(slots, device=DEVICE, generator=generator)
        self.slots, self.other = order[:context].contiguous(), order[context : 2 * context].contiguous()
        count = max(1, int(share * context))
        self.rows = torch.randperm(context, device=DEVICE, generator=generator)[:count].sort().values
        self.query = torch.randn(count, HEADS, DIM, device=DEVICE, generator=generator).to(DTYPE)
        self.probe = torch.randn(PROBE_ROWS, HEADS, DIM, device=DEVICE, generator=generator).to(DTYPE)
        self.own = tuple(
            torch.randn(PROBE_ROWS, KV_HEADS, DIM, device=DEVICE, generator=generator).to(DTYPE) for _ in "kv"
        )
        self.fresh = tuple(
            torch.randn(count, KV_HEADS, DIM, device=DEVICE, generator=generator).to(DTYPE) for _ in "kv"
        )
        angle = torch.rand(context, DIM // 2, device=DEVICE, generator=generator) * 2 * math.pi
        self.rotation = Rotation(angle.cos(), angle.sin())
        self.rope = RopeTable(torch.cat(self.rotation, -1), True)

    def observed(self) -> ObservedRows:
        """The rows are observed, and all others corrected, in spans of 1,000 tokens."""
        context, count = len(self.slots), len(self.rows)
        spans = [(begin, min(begin + 1000, context)) for begin in range(0, context, 1000)]
        positions = torch.arange(context, device=DEVICE)
        return ObservedRows(spans, positions, self.slots, self.rows, 0, count, 0, context)


def weights64(query: torch.Tensor, keys: torch.Tensor, kv_lens: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Attention weights of rows over the first ``kv_lens`` keys, float64 (rows, heads, n)."""
    keys = keys.double().repeat_interleave(HEADS // KV_HEADS, 1)
    logits = torch.einsum("rhd,nhd->rhn", query.double(), keys) * spec.scaling
    if spec.logit_cap:
        logits = spec.logit_cap * (logits / spec.logit_cap).tanh()
    distance = kv_lens[:, None] - 1 - torch.arange(len(keys), device=keys.device)
    hidden = (distance < 0) | (distance > (len(keys) if spec.window is None else spec.window))
    logits = logits.masked_fill(hidden[:, None], -math.inf)
    if spec.sinks is None:
        return logits.softmax(-1)
    sinks = spec.sinks.double().view(1, -1, 1).expand(len(query), -1, 1)
    return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Relative error, on the device; NaN if any element is."""
    return (found.double() - exact).norm() / exact.norm()
