"""Chooses the row attention of a device: the fastest backend that gives right results there."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from a3_sglang.attention.base import AttentionSpec, RequestRows, RowAttention
from a3_sglang.attention.torch_cpu import TorchRowAttention
from a3_sglang.timing import seconds

logger = logging.getLogger(__name__)

CONTEXTS = (32768, 6000, 2300)
"""Tokens of the trial's prompts: long ones count most, as in serving."""
SHARE = 0.15
"""Fraction of the positions that are used as queries."""
TOLERANCE = 1e-2
"""Relative error against float32; rounding to bf16 alone costs a third of it."""
SAMPLE = 64
"""Rows of each prompt that are compared."""
REPEATS = 5


class NoUsableBackendError(ValueError):
    """No backend gives right results on this device; the message says what is wrong with each."""


def fastest(
    candidates: Mapping[str, Callable[[], RowAttention]],
    heads: int,
    pool: torch.Tensor,
    layers: int,
    contexts: Sequence[int] = CONTEXTS,
) -> RowAttention:
    """Try all candidates on rows of random prompts and return the fastest that is right.

    Args:
        candidates: constructors by name.
        heads: query heads per layer.
        pool: (slots, kv_heads, head_dim), a layer's keys; gives shapes, dtype and device, and is not read.
        layers: of the model, which share one plan.
        contexts: tokens of the prompts.

    Raises:
        NoUsableBackendError: no candidate is right.
    """
    trial, times, wrong = _Trial(heads, pool, contexts), dict[str, float](), dict[str, str]()
    made: dict[str, RowAttention] = {}
    for name, make in candidates.items():
        # A library may compile its kernels on the first start of a machine, which takes minutes.
        logger.info("a3: trying row attention by %s", name)
        try:
            made[name] = make()
            error = trial.error(made[name])
        except Exception as failure:
            wrong[name] = f"{type(failure).__name__}: {failure}"
            continue
        if error <= TOLERANCE:  # False for NaN.
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
    """Random prompts, some of whose rows attend, and what a sample of these should get."""

    def __init__(self, heads: int, pool: torch.Tensor, contexts: Sequence[int]) -> None:
        _, self._kv_heads, dim = pool.shape
        self._heads, self._dtype, self._spec = heads, pool.dtype, AttentionSpec(dim**-0.5)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(sum(contexts), generator=generator).split(list(contexts))
        self._requests, rows = [], 0
        for slots in order:
            count = max(1, int(SHARE * len(slots)))
            kv_lens = torch.randperm(len(slots), generator=generator)[:count].sort().values + 1
            self._requests.append(
                RequestRows(rows, rows + count, slots.to(pool.device), kv_lens.to(pool.device), exact=False)
            )
            rows += count

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device=pool.device, dtype=pool.dtype)

        self._keys, self._values = (random(sum(contexts), self._kv_heads, dim) for _ in "kv")
        self._query = random(rows, heads, dim)
        samples = [torch.linspace(0, len(r.kv_lens) - 1, SAMPLE).long().to(pool.device) for r in self._requests]
        self._sample = torch.cat([r.begin + sample for r, sample in zip(self._requests, samples, strict=True)])
        sampled = [
            RequestRows(i * SAMPLE, (i + 1) * SAMPLE, r.slots, r.kv_lens[sample], exact=False)
            for i, (r, sample) in enumerate(zip(self._requests, samples, strict=True))
        ]
        reference = TorchRowAttention().plan(sampled, heads, self._kv_heads, torch.float32)
        expected = reference(self._query[self._sample].float(), self._keys.float(), self._values.float(), self._spec)
        self._expected = expected.split(SAMPLE)

    def run(self, attention: RowAttention, layers: int = 1) -> torch.Tensor:
        attend = attention.plan(self._requests, self._heads, self._kv_heads, self._dtype)
        for _ in range(layers):
            out = attend(self._query, self._keys, self._values, self._spec)
        return out

    def error(self, attention: RowAttention) -> float:
        """Relative error on a sample of rows, the largest of all prompts."""
        out = self.run(attention)[self._sample].float().split(SAMPLE)
        pairs = zip(out, self._expected, strict=True)
        return max(float((found - expected).norm() / expected.norm()) for found, expected in pairs)

    def milliseconds(self, attention: RowAttention, layers: int) -> float:
        """Median time of a whole pass."""
        return statistics.median(seconds(lambda: self.run(attention, layers), self._query.device, REPEATS)) * 1e3
