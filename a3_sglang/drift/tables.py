"""The model of drift as the kernels in ``kernels/`` take it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from a3_sglang.drift.model import Covariance

if TYPE_CHECKING:
    from a3_sglang.kernels.drift_common import CovarianceTable


def covariance_table(kind: Covariance, longest: int, device: torch.device) -> CovarianceTable:
    """The table of a covariance for spans of at most ``longest`` rows."""
    return _covariance_table(kind, 1 << (longest - 1).bit_length(), device)


@cache
def _covariance_table(kind: Covariance, rows: int, device: torch.device) -> CovarianceTable:
    from a3_sglang.kernels.common import LOG2E
    from a3_sglang.kernels.drift_common import CovarianceTable

    scales = kind.scale(torch.arange(rows, device=device))
    rates = LOG2E / kind.shared_range, LOG2E / kind.local_range
    return CovarianceTable(kind.shared_sill, rates[0], kind.local_sill, rates[1], kind.damping, scales)
