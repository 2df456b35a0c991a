"""The model of drift: how the errors of copied KV vary along a span, and how those of two rows vary together.

The KV of a span was computed after another context. A row's *drift* is its KV as this prompt would compute it, minus
the copied KV. Rows near each other in one span have similar drift, as they miss the same context. So the drift of the
recomputed rows, which is observed as soon as their fresh KV replaces the copied, predicts the drift of the rows
between them. These are corrected at once, layer by layer, while the recomputed rows go through the model
(``drift/correction.py``).

The prediction is simple kriging (Gaussian process regression with mean zero): drift covaries by distance within a
span, not at all between spans, and a row far from every recomputed one stays nearly as it was copied. Keys are compared
as they were before RoPE.

The same model says which rows to recompute (``drift/selection.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ConfigDict

MAX_BLOCK = 512
"""Longest run of a span's rows that are predicted together; it bounds the linear systems to solve."""


MIN_NUGGET = 0.01
"""Least share of the variance that a row shares with no other row; it keeps matrices positive definite in float32."""
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("shared_sill", "local_sill", "damping"), lambda value: 0 <= value <= 1, "from 0 to 1"),
    (("shared_range", "local_range", "start_variance"), lambda value: 0 < value < math.inf, "positive and finite"),
    (("variance_decay",), lambda value: 0 <= value < math.inf, "finite and not negative"),
    (("min_local_variance",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
)
"""Fields of a :class:`Covariance`, and which values they may have; NaN never."""


@dataclass(frozen=True)
class Covariance:
    """Covariance of the drift of two rows of one span, by their offsets from the beginning of the span.

    A row drifts more the nearer it is to the beginning of its span, where most of what it attended to was another
    context; but the part of the drift that it shares with distant rows does not grow with that. The unit is the
    variance well inside a span.

    Attributes:
        shared_sill, shared_range: variance of the part that all rows of a span share, and the distance over which it
            decays: its covariance is ``shared_sill * exp(-distance / shared_range)``.
        local_sill, local_range: the same of a part that close neighbours share; multiplied by the :meth:`scale` of
            both rows.
        start_variance: variance at offset 0.
        variance_decay: the power of ``1 + offset`` by which the variance falls.
        min_local_variance: lower bound of the squared :meth:`scale`.
        damping: share of a prediction that is applied. That answers are better with less than 1 is measured, not
            derived: not all that a recompute shows is drift, as the recomputed rows attend to stale ones.
    """

    shared_sill: float
    shared_range: float
    local_sill: float
    local_range: float
    start_variance: float
    variance_decay: float
    min_local_variance: float
    damping: float

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a field is out of its range; the message begins with its name.
        """
        for names, is_valid, range_ in _RANGES:
            for name in names:
                if not is_valid(value := getattr(self, name)):
                    raise ValueError(f"{name} must be {range_}, not {value}")
        if not self.shared_sill + self.local_sill <= 1 - MIN_NUGGET:
            raise ValueError(
                f"shared_sill + local_sill must be at most {1 - MIN_NUGGET}, as the rest is the nugget, "
                f"not {self.shared_sill + self.local_sill}"
            )

    def scale(self, offset: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the non-shared part at ``offset``, relative to its value well inside a span."""
        variance = self.start_variance * (1 + offset.float()) ** -self.variance_decay
        return ((variance - self.shared_sill) / (1 - self.shared_sill)).clamp(min=self.min_local_variance).sqrt()

    def nugget(self, offset: torch.Tensor) -> torch.Tensor:
        """Variance of the part that a row shares with no other row."""
        return (1 - self.shared_sill - self.local_sill) * self.scale(offset).square()

    def variance(self, offset: torch.Tensor) -> torch.Tensor:
        """Variance of all parts together."""
        return self.shared_sill + (1 - self.shared_sill) * self.scale(offset).square()

    def __call__(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Covariance of rows at offsets (..., n) and (..., m), float32 (..., n, m), without nugget."""
        distance = (one[..., :, None] - other[..., None, :]).abs().float()
        local_sill = self.local_sill * self.scale(one)[..., :, None] * self.scale(other)[..., None, :]
        shared = self.shared_sill * (-distance / self.shared_range).exp()
        return shared + local_sill * (-distance / self.local_range).exp()


@dataclass(frozen=True)
class DriftModel:
    """How the drift of one language model's copied KV varies; the same in all its layers.

    Attributes:
        keys: covariance of the drift of keys as they were before RoPE.
        values: that of values.
    """

    keys: Covariance
    values: Covariance


DEFAULT = DriftModel(
    keys=Covariance(
        shared_sill=0.36,
        shared_range=300,
        local_sill=0.27,
        local_range=5,
        start_variance=6.5,
        variance_decay=0.38,
        min_local_variance=0.5,
        damping=0.85,
    ),
    values=Covariance(
        shared_sill=0.28,
        shared_range=220,
        local_sill=0.22,
        local_range=4,
        start_variance=6.5,
        variance_decay=0.38,
        min_local_variance=0.5,
        damping=0.5,
    ),
)
"""Fitted to SmolLM2-135M, to harvested and compiled donors alike; ``a3-sglang calibrate --print`` prints the measured
values beside it."""


def cut_blocks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """First offset and number of rows of each block, span after span.

    Args:
        lengths: rows of each span.
    """
    return [(begin, min(MAX_BLOCK, length - begin)) for length in lengths for begin in range(0, length, MAX_BLOCK)]


class PaddedBlocks:
    """The reused rows of a request in blocks of at most :data:`MAX_BLOCK`, padded to the length of the longest.

    All sizes are known on the host, so nothing here forces a host-device sync.

    Args:
        lengths: rows of each span, in prompt order.
        device: of the tensors.

    Attributes:
        shape: (blocks, size).
        cell: int64 (reused,), index of each row in a flattened (blocks, size).
        offsets: int64 (blocks, size), offset of each row from the beginning of its span.
    """

    def __init__(self, lengths: Sequence[int], device: Any) -> None:
        cuts = cut_blocks(lengths)
        size = max((count for _, count in cuts), default=0)
        self.shape = len(cuts), size
        # Only this small table is copied from the host, without a sync; large tensors are made on the device.
        table = torch.tensor(cuts, dtype=torch.int64).view(-1, 2).to(device, non_blocking=True)
        begins, counts = table.unbind(1)
        shifts = torch.arange(len(cuts), device=device) * size - counts.cumsum(0) + counts
        rows = sum(count for _, count in cuts)
        self.cell = torch.arange(rows, device=device) + shifts.repeat_interleave(counts, output_size=rows)
        self.offsets = begins[:, None] + torch.arange(size, device=device)

    def pad(self, by_row: torch.Tensor, fill: float) -> torch.Tensor:
        """Arrange ``by_row`` (reused,) as (blocks, size), with ``fill`` in cells that have no row."""
        cells = by_row.new_full((self.shape[0] * self.shape[1],), fill)
        return cells.index_copy_(0, self.cell, by_row).view(self.shape)


def observed_first(observed: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of each block, observed rows first, and which of these are observed, both (blocks, width).

    Args:
        observed: bool (blocks, size).
        most: upper bound of the observed rows per block. It is the width on a GPU, as counting them would force a sync;
            on a CPU the width is their true maximum, which saves work.
    """
    most = min(most, observed.shape[1])
    if observed.device.type == "cpu":
        most = int(observed.sum(1).max()) if len(observed) else 0
    is_observed, columns = (x[:, :most] for x in observed.sort(dim=1, descending=True, stable=True))
    return columns, is_observed


def cholesky_factor(covariance: torch.Tensor, nugget: torch.Tensor, is_observed: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of the observed rows' covariance, nugget included; other columns are independent of all.

    Args:
        covariance: float32 (blocks, width, width), without nugget, zero outside the observed rows; is overwritten.
        nugget: float32 (blocks, width).
        is_observed: bool (blocks, width).
    """
    covariance.diagonal(dim1=1, dim2=2).add_(nugget.where(is_observed, 1.0))
    # Success is not checked, which would force a sync: the nugget keeps the matrix positive definite.
    return torch.linalg.cholesky_ex(covariance).L
