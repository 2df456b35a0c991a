"""The correction of drift and the selection of rows in float64, from their definitions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import torch

from a3_sglang.drift import selection
from a3_sglang.drift.model import DEFAULT, Covariance, DriftModel
from a3_sglang.matching.plan import Plan
from helpers.reference import Llama, backwards, rope64


def drawn_model(seed: int) -> DriftModel:
    """A random model of drift; at least a tenth of the variance is nugget."""
    chooser = random.Random(seed)

    def covariance() -> Covariance:
        shared = chooser.uniform(0.1, 0.5)
        return Covariance(
            shared_sill=shared,
            shared_range=chooser.uniform(50, 500),
            local_sill=chooser.uniform(0.1, 0.9 - shared),
            local_range=chooser.uniform(2, 12),
            start_variance=chooser.uniform(2, 12),
            variance_decay=chooser.uniform(0.1, 0.6),
            min_local_variance=chooser.uniform(0.2, 0.8),
            damping=chooser.uniform(0.3, 1),
        )

    return DriftModel(covariance(), covariance())


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
        variance = kind.start_variance / (1 + p - begins[p]) ** kind.variance_decay
        return math.sqrt(max(kind.min_local_variance, (variance - kind.shared_sill) / (1 - kind.shared_sill)))

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
        (observed, others, *(weights(kind, observed, others) for kind in (model.drift.keys, model.drift.values)))
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


# ---- Selection


def offsets_of(spans: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in spans])


def drawn_weights(seed: int, count: int) -> torch.Tensor:
    """Log-normal weights, as uneven as attention."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(2).exp()


def covariance64(offsets: torch.Tensor, block: int, keys: Covariance = DEFAULT.keys) -> torch.Tensor:
    """Covariance of the key drift of all rows, nugget included."""
    block_of = (offsets % block == 0).cumsum(0)
    same_block = block_of[:, None] == block_of
    return keys(offsets, offsets).double() * same_block + keys.nugget(offsets).double().diag()


def posterior(covariance: torch.Tensor, weight: torch.Tensor, observed: torch.Tensor) -> float:
    """Weighted posterior variance, as a share of the prior."""
    cross = covariance[:, observed]
    explained = (cross @ torch.linalg.inv(cross[observed]) * cross).sum(1)
    return float(weight.double() @ (covariance.diagonal() - explained) / (weight.double() @ covariance.diagonal()))


def greedy64(covariance: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    """In rounds; each row by the variance that observing it alone would remove."""
    chosen: list[int] = []
    for part in torch.arange(count).tensor_split(selection.ROUNDS):
        if chosen:
            cross = covariance[:, chosen]
            given_chosen = covariance - cross @ torch.linalg.inv(cross[chosen]) @ cross.T
        else:
            given_chosen = covariance
        open_weight = weight.double().clone()
        open_weight[chosen] = 0
        gain = (given_chosen.square() @ open_weight) / given_chosen.diagonal()
        gain[chosen] = -1
        chosen += gain.argsort(descending=True, stable=True)[: len(part)].tolist()
    return chosen
