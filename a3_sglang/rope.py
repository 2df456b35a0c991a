"""Moves keys to other positions with the model's own RoPE tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Rotation(NamedTuple):
    """Cosine and sine of the angles by which rows are rotated, each float32 (rows, rotary_dim / 2), contiguous."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class RopeTable:
    """The cos/sin table of one rotary module.

    Attributes:
        cos_sin: (positions, rotary_dim); cosines in the first half, sines in the second, as the model multiplies
            with them (in its dtype and with its scaling factor).
        neox: dimension i is paired with i + rotary_dim / 2 (True), or 2i with 2i + 1 (False).
    """

    cos_sin: torch.Tensor
    neox: bool

    @property
    def rotary_dim(self) -> int:
        return self.cos_sin.shape[1]

    def rotation(self, old: torch.Tensor, new: torch.Tensor) -> Rotation:
        """The rotation that takes keys from positions ``old`` to ``new``.

        It is the quotient of the table's own entries, so it undoes exactly what the model did at ``old``, rounding and
        scaling of the table included, and does what the model would do at ``new``. (RoFormer, arXiv 2104.09864,
        Section 3.2: angles of successive rotations add up.)

        Args:
            old: int64 (n,), positions of the keys.
            new: int64 (n,), positions to rotate them to.
        """
        half = self.rotary_dim // 2
        before, after = self.cos_sin[old].float(), self.cos_sin[new].float()
        c0, s0, c1, s1 = before[:, :half], before[:, half:], after[:, :half], after[:, half:]
        norm = c0 * c0 + s0 * s0
        return Rotation((c1 * c0 + s1 * s0) / norm, (s1 * c0 - c1 * s0) / norm)


def rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, neox: bool) -> torch.Tensor:
    """Rotate keys by the given angles.

    Args:
        keys: (n, heads, head_dim), any float dtype; the first ``2 * cos.shape[1]`` of head_dim are rotated.
        cos: float32 (n, rotary_dim / 2).
        sin: like ``cos``.
        neox: pairing of the dimensions.

    Returns:
        A new tensor like ``keys``; computed in float32.
    """
    half = cos.shape[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    part = keys[..., : 2 * half].float()
    rotated = torch.empty_like(part)
    (a, b), (to_a, to_b) = (
        (x[..., :half], x[..., half:]) if neox else (x[..., 0::2], x[..., 1::2]) for x in (part, rotated)
    )
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin)
    if 2 * half == keys.shape[-1]:
        return rotated.to(keys.dtype)
    return torch.cat([rotated.to(keys.dtype), keys[..., 2 * half :]], -1)


def copy_rotated(
    keys: torch.Tensor,
    values: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    rotation: Rotation,
    neox: bool,
) -> None:
    """Copy KV rows of one layer between slots, rotating the keys.

    Args:
        keys: (slots, heads, head_dim), written in place.
        values: like ``keys``.
        source: int64 (n,), slots to copy from.
        target: int64 (n,), slots to copy to; none of ``source``.
        rotation: of these rows, from :meth:`RopeTable.rotation`.
        neox: pairing of the dimensions.
    """
    keys.index_copy_(0, target, rotate(keys.index_select(0, source), *rotation, neox))
    values.index_copy_(0, target, values.index_select(0, source))
