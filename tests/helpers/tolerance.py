"""How far apart numbers may be in the dtype that the tests' engines compute in."""

from __future__ import annotations

import os

import torch

DTYPE: torch.dtype = getattr(torch, os.environ["A3_TEST_DTYPE"])
EPS: float = torch.finfo(DTYPE).eps
"""From 1 to the next number."""


SUMS = 4 if DTYPE is torch.float32 else 1
"""float32 is also what sums are rounded to, term by term; a narrower dtype is rounded to at their end only."""


def roundings(count: float) -> float:
    """The relative error of a number that was rounded so many times, always the same way."""
    return count * SUMS * EPS / 2


def turned(position: int) -> float:
    """The relative error of RoPE at a position: its angle is the position times a frequency, in float32."""
    return position * torch.finfo(torch.float32).eps


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference by the norm of what is expected, in float64."""
    wanted = expected.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def assert_same_prefill(found: torch.Tensor, expected: torch.Tensor) -> None:
    """KV of two full prefills: bit-equal, unless sums show in which order they were added up."""
    if DTYPE is torch.float32:
        assert distance(found, expected) < roundings(5)
    else:
        assert torch.equal(found, expected)
