"""How far apart numbers may be in the dtype of the tests' engines."""

from __future__ import annotations

import os

import torch

DTYPE: torch.dtype = getattr(torch, os.environ["A3_TEST_DTYPE"])
EPS: float = torch.finfo(DTYPE).eps
"""Distance from 1 to the next larger number."""


SUMS = 4 if DTYPE is torch.float32 else 1
"""Roundings per sum: in float32 every term is rounded, in a narrower dtype only the total."""


def roundings(count: float) -> float:
    """Relative error of a number that was rounded ``count`` times in the same direction."""
    return count * SUMS * EPS / 2


def rope_error(position: int) -> float:
    """Relative error of RoPE at a position: its angle is the position times a frequency, in float32."""
    return position * torch.finfo(torch.float32).eps


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of ``expected``, in float64."""
    wanted = expected.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def assert_same_prefill(found: torch.Tensor, expected: torch.Tensor) -> None:
    """KV of two full prefills: bit-equal, except in float32, where sums depend on the order of their terms."""
    if DTYPE is torch.float32:
        assert distance(found, expected) < roundings(5)
    else:
        assert torch.equal(found, expected)
