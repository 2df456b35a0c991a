"""Drift: which rows to recompute, and what these tell about the rows between them.

The KV of a span was computed behind another context. How far a row's copied KV is from what this prompt makes of it,
its *drift*, is much the same for rows near each other in one span: they miss the same context. So the drift of the
recomputed rows, known as soon as their fresh KV replaces the copied, predicts that of the rows between them, and is
taken off these at once, layer by layer, while the recomputed rows go through the model.

The prediction is simple kriging (Gaussian-process regression with mean zero): rows of one span vary together by their
distance, those of different spans do not, and a row far from every recomputed one stays nearly as it was copied. Keys
are compared as they were before RoPE.

The same model says which rows to recompute (:func:`a3_sglang.drift.selection.select_a_optimal`): those after which the question has the least to
lose, a row's own drift and that of its neighbours, which it helps to predict, together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 512
"""Rows of a span that tell about each other, at most; bounds the systems to solve."""


@dataclass(frozen=True)
class Covariance:
    """How the drift of two rows of one span varies together, by their offsets from the span's beginning.

    A row drifts more the nearer it stands to the beginning of its span, where most of what it had seen was another
    context; but the part of the drift that it shares with far rows does not grow with that. In units of the variance
    some way into a span.

    Attributes:
        common, reach: a part alike in the span's rows, whose covariance falls off as ``exp(-distance / reach)``.
        near, close: another of close neighbours, times the :meth:`scale` of both, as ``exp(-distance / close)``.
        trust: share of a prediction that is applied. That answers are better with less than 1 is measured, not
            derived: what a recompute shows is not all drift, as the recomputed rows attend to stale ones.
    """

    common: float
    reach: float
    near: float
    close: float
    trust: float

    def scale(self, offset: torch.Tensor) -> torch.Tensor:
        """How much larger than some way into a span the part is that is not common (standard deviation)."""
        variance = AT_BEGINNING * (1 + offset.float()) ** -FALL
        return ((variance - self.common) / (1 - self.common)).clamp(min=DEEP).sqrt()

    def own(self, offset: torch.Tensor) -> torch.Tensor:
        """Variance of the part that a row shares with none."""
        return (1 - self.common - self.near) * self.scale(offset).square()

    def variance(self, offset: torch.Tensor) -> torch.Tensor:
        """Of all parts together."""
        return self.common + (1 - self.common) * self.scale(offset).square()

    def __call__(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Covariance of rows at offsets ``one`` (..., n) and ``other`` (..., m), float32 (..., n, m).

        The own part of a row with itself is left out.
        """
        distance = (one[..., :, None] - other[..., None, :]).abs().float()
        near = self.near * self.scale(one)[..., :, None] * self.scale(other)[..., None, :]
        return self.common * (-distance / self.reach).exp() + near * (-distance / self.close).exp()


AT_BEGINNING, FALL, DEEP = 6.5, 0.38, 0.5
"""Variance of the drift at offset 0, the power of ``1 + offset`` by which it falls, and what stays of its scale."""
KEYS = Covariance(common=0.36, reach=300, near=0.27, close=5, trust=0.85)
VALUES = Covariance(common=0.28, reach=220, near=0.22, close=4, trust=0.5)
"""Fitted to harvested and compiled donors alike; ``benchmarks/drift.py`` prints both beside it."""


class PaddedBlocks:
    """Rows of spans in blocks of at most :data:`BLOCK`, padded to the length of the longest.

    All sizes are known on the host, so nothing here waits for a device.

    Args:
        lengths: rows of each span; the rows of all spans are numbered through.
        device: where the rows' tensors lie.

    Attributes:
        shape: (blocks, size).
        place: int64 (rows,), where each row stands in a flattened (blocks, size).
        offsets: int64 (blocks, size), how far behind the beginning of its span each row stands.
    """

    def __init__(self, lengths: Sequence[int], device: Any) -> None:
        cut = [(at, min(BLOCK, length - at)) for length in lengths for at in range(0, length, BLOCK)]
        size = max((count for _, count in cut), default=0)
        self.shape = len(cut), size
        # A small table, which a device takes without being waited for; what is large is made there.
        table = torch.tensor(cut, dtype=torch.int64).view(-1, 2).to(device, non_blocking=True)
        begins, counts = table.unbind(1)
        shifts = torch.arange(len(cut), device=device) * size - counts.cumsum(0) + counts
        rows = sum(count for _, count in cut)
        self.place = torch.arange(rows, device=device) + shifts.repeat_interleave(counts, output_size=rows)
        self.offsets = begins[:, None] + torch.arange(size, device=device)

    def spread(self, of_rows: torch.Tensor, other: float) -> torch.Tensor:
        """Something of all rows as (blocks, size), with ``other`` where there is none."""
        return (
            of_rows.new_full((self.shape[0] * self.shape[1],), other)
            .index_copy_(0, self.place, of_rows)
            .view(self.shape)
        )


def known_first(known: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the known rows of each block, and which of them are real, both (blocks, width).

    Args:
        known: bool (blocks, size).
        most: rows known in a block, at most. A device is not asked how many there are; a CPU is, which saves work.
    """
    most = min(most, known.shape[1])
    if known.device.type == "cpu":
        most = int(known.sum(1).max()) if len(known) else 0
    real, columns = (x[:, :most] for x in known.sort(dim=1, descending=True, stable=True))
    return columns, real


def cholesky_factor(among: torch.Tensor, own: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of the known rows' covariance, their own parts added; columns that are not real stand alone."""
    among.diagonal(dim1=1, dim2=2).add_(own.where(real, 1.0))
    # Without looking whether it worked, which would wait for the device: the own parts keep it positive definite.
    return torch.linalg.cholesky_ex(among).L
