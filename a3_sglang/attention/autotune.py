"""Which row attention a device gets: of those that are right on it, the fastest."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from a3_sglang.attention.base import RequestRows, RowAttention
from a3_sglang.attention.torch_cpu import TorchRowAttention
from a3_sglang.timing import seconds

logger = logging.getLogger(__name__)

CONTEXTS = (6000, 2300)
"""Prompts of the trial, tokens."""
SHARE = 0.15
"""Of their rows, those that attend."""
TOLERANCE = 1e-2
"""Relative error against float32; rounding to bf16 alone costs a third of it."""
SAMPLE = 64
"""Rows of each prompt that are compared."""
REPEATS = 5


class NoUsableBackendError(ValueError):
    """No implementation gives right results on this device; the message says what is wrong with each."""


def fastest(
    candidates: Mapping[str, Callable[[], RowAttention]],
    heads: int,
    pool: torch.Tensor,
    layers: int,
    contexts: Sequence[int] = CONTEXTS,
) -> RowAttention:
    """Try all on rows of random prompts and keep the fastest right one.

    Args:
        candidates: makers by name.
        heads: query heads of a layer.
        pool: (slots, kv_heads, head_dim), a layer's keys; tells shapes, dtype and device, and is not touched.
        layers: of the model; so many calls share a plan.
        contexts: tokens of the prompts.

    Raises:
        NoUsableBackendError: none is right.
    """
    trial, times, wrong = _Trial(heads, pool, contexts), dict[str, float](), dict[str, str]()
    made: dict[str, RowAttention] = {}
    for name, make in candidates.items():
        try:
            made[name] = make()
            error = trial.error(made[name])
        except Exception as failure:
            wrong[name] = f"{type(failure).__name__}: {failure}"
            continue
        if error <= TOLERANCE:  # Not so where it is no number.
            times[name] = trial.milliseconds(made[name], layers)
        else:
            wrong[name] = f"off by {error:.3g} from float32"
    for name, reason in wrong.items():
        logger.warning("a3: row attention by %s is not used: %s", name, reason)
    if not times:
        raise NoUsableBackendError(f"no row attention works here ({'; '.join(f'{k}: {v}' for k, v in wrong.items())})")
    best = min(times, key=times.__getitem__)
    logger.info("a3: row attention by %s (%s)", best, ", ".join(f"{k} {v:.3f} ms" for k, v in times.items()))
    return made[best]


class _Trial:
    def __init__(self, heads: int, pool: torch.Tensor, contexts: Sequence[int]) -> None:
        _, self._kv_heads, dim = pool.shape
        self._heads, self._dtype, self._scaling = heads, pool.dtype, dim**-0.5
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(sum(contexts), generator=generator).split(list(contexts))
        self._groups, rows = [], 0
        for slots in order:
            count = max(1, int(SHARE * len(slots)))
            visible = torch.randperm(len(slots), generator=generator)[:count].sort().values + 1
            self._groups.append(
                RequestRows(rows, rows + count, slots.to(pool.device), visible.to(pool.device), exact=False)
            )
            rows += count

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device=pool.device, dtype=pool.dtype)

        self._keys, self._values = (random(sum(contexts), self._kv_heads, dim) for _ in "kv")
        self._query = random(rows, heads, dim)
        some = [torch.linspace(0, len(group.visible) - 1, SAMPLE).long().to(pool.device) for group in self._groups]
        self._sample = torch.cat([group.begin + rows for group, rows in zip(self._groups, some, strict=True)])
        sampled = [
            RequestRows(i * SAMPLE, (i + 1) * SAMPLE, group.slots, group.visible[rows], exact=False)
            for i, (group, rows) in enumerate(zip(self._groups, some, strict=True))
        ]
        reference = TorchRowAttention().plan(sampled, heads, self._kv_heads, torch.float32)
        exact = reference(self._query[self._sample].float(), self._keys.float(), self._values.float(), self._scaling)
        self._exact = exact.split(SAMPLE)

    def run(self, attention: RowAttention, layers: int = 1) -> torch.Tensor:
        attend = attention.plan(self._groups, self._heads, self._kv_heads, self._dtype)
        for _ in range(layers):
            out = attend(self._query, self._keys, self._values, self._scaling)
        return out

    def error(self, attention: RowAttention) -> float:
        """Largest relative error of a prompt, on a sample of its rows."""
        out = self.run(attention)[self._sample].float().split(SAMPLE)
        return max(float((one - exact).norm() / exact.norm()) for one, exact in zip(out, self._exact, strict=True))

    def milliseconds(self, attention: RowAttention, layers: int) -> float:
        """Median of a whole pass."""
        return statistics.median(seconds(lambda: self.run(attention, layers), self._query.device, REPEATS)) * 1e3
