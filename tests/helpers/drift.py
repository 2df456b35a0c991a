"""The selection and the correction by the model of drift in float64, from its definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from a3_sglang.drift.model import KEYS, MIN_LOCAL_VARIANCE, VALUES, VARIANCE_AT_START, VARIANCE_DECAY, Covariance
from a3_sglang.matching.plan import Plan
from helpers.reference import Llama, backwards, rope64


def span_offsets(spans: Sequence[int]) -> torch.Tensor:
    """Offset of every row from the beginning of its span."""
    return torch.cat([torch.arange(length) for length in spans])


def drawn_weights(seed: int, count: int) -> torch.Tensor:
    """Log-normal weights, as uneven as attention."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(2).exp()


def design_covariance64(offsets: torch.Tensor, block: int) -> torch.Tensor:
    """Covariance of the key drift of all rows, nugget included."""
    block_of = (offsets % block == 0).cumsum(0)
    same_block = block_of[:, None] == block_of
    return KEYS(offsets, offsets).double() * same_block + KEYS.nugget(offsets).double().diag()


def posterior64(covariance: torch.Tensor, weight: torch.Tensor, observed: Sequence[int] | torch.Tensor) -> float:
    """Weighted posterior variance, as a share of the prior."""
    cross = covariance[:, observed]
    explained = (cross @ torch.linalg.inv(cross[observed]) * cross).sum(1)
    return float(weight.double() @ (covariance.diagonal() - explained) / (weight.double() @ covariance.diagonal()))


def drift_correction64(
    model: Llama, plan: Plan, chosen: torch.Tensor, block: int, wanted: tuple[int, int] | None = None
) -> Callable[..., None]:
    """The correction of one layer, row by row from the definition; a callback for :meth:`Llama.rows64`.

    Args:
        model: with the RoPE table.
        plan: of the prompt.
        chosen: int64, positions of the recomputed rows.
        block: rows of a span that are predicted together.
        wanted: first and end of the positions that are corrected; None: all of the plan.
    """
    first, last = wanted or (plan.prefix, plan.end)
    table = model.ropes[0].cos_sin.double()
    back = backwards(table)
    recomputed = set(chosen.tolist())

    begins = {p: span.start for span in plan.spans for p in range(span.start, span.end)}

    def scale(kind: Covariance, p: int) -> float:
        variance = VARIANCE_AT_START / (1 + p - begins[p]) ** VARIANCE_DECAY
        return math.sqrt(max(MIN_LOCAL_VARIANCE, (variance - kind.shared_sill) / (1 - kind.shared_sill)))

    def covariance(kind: Covariance, a: int, b: int) -> float:
        d = abs(a - b)
        local = kind.local_sill * math.exp(-d / kind.local_range) + (1 - kind.shared_sill - kind.local_sill) * (a == b)
        return kind.shared_sill * math.exp(-d / kind.shared_range) + scale(kind, a) * scale(kind, b) * local

    def blocks() -> Iterator[tuple[list[int], list[int]]]:
        for span in plan.spans:
            for start in range(span.start, span.end, block):
                rows = range(start, min(start + block, span.end))
                others = [p for p in rows if p not in recomputed and first <= p < last]
                yield [p for p in rows if p in recomputed], others

    def weights(kind: Covariance, observed: list[int], others: list[int]) -> torch.Tensor:
        among = [[covariance(kind, a, b) for b in observed] for a in observed]
        cross = [[covariance(kind, p, a) for a in observed] for p in others]
        return kind.damping * torch.tensor(cross, dtype=torch.float64) @ torch.linalg.inv(torch.tensor(among).double())

    plans = [
        (observed, others, *(weights(kind, observed, others) for kind in (KEYS, VALUES)))
        for observed, others in blocks()
        if observed and others
    ]

    def correct(
        layer: int, given_keys: torch.Tensor, given_values: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        if not layer:
            return
        for observed, others, key_weights, value_weights in plans:
            drift = rope64(keys[observed] - given_keys[observed], back[observed], model.neox)
            keys[others] += rope64(torch.einsum("wk,khd->whd", key_weights, drift), table[others], model.neox)
            drift = values[observed] - given_values[observed]
            values[others] += torch.einsum("wk,khd->whd", value_weights, drift)

    return correct
