"""Copies KV between slots in all layers at once and rotates the keys to their new positions on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import DTYPES
from a3_sglang.rope import Rotation

COPIED_ROWS = 16
"""Rows that one program copies, all heads of one layer."""
ALIGNMENT = 16
"""Bytes per memory access."""


@dataclass(frozen=True, slots=True)
class Pools:
    """The KV pools of layers that share one rotary table, as a kernel can reach them.

    Attributes:
        keys, values: int64 (layers,), addresses.
        key_strides, value_strides: in elements, per slot and per head; head_dim is contiguous.
        heads, dim: of every layer.
        dtype: of every layer.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_strides: tuple[int, int]
    value_strides: tuple[int, int]
    heads: int
    dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Pools:
        """Take the addresses of pools (slots, heads, head_dim), one per layer; these must outlive the result.

        Raises:
            ValueError: they differ in more than their addresses, or the kernel cannot read them.
        """
        key_layouts = {(pool.shape, pool.dtype, pool.stride(), pool.device) for pool in keys}
        value_layouts = {(pool.shape, pool.dtype, pool.stride(), pool.device) for pool in values}
        if len(key_layouts) != 1 or len(value_layouts) != 1 or keys[0].shape != values[0].shape:
            raise ValueError("the KV pools of the layers differ in shape, dtype, layout or device")
        if keys[0].stride(2) != 1 or values[0].stride(2) != 1 or keys[0].dtype not in DTYPES:
            raise ValueError(f"KV pools in {keys[0].dtype} with strides {keys[0].stride()} cannot be copied")
        addresses = torch.tensor([[pool.data_ptr() for pool in kind] for kind in (keys, values)], dtype=torch.int64)
        if bool((addresses % ALIGNMENT).any()):
            raise ValueError(f"KV pools that do not begin at multiples of {ALIGNMENT} bytes cannot be copied")
        key_addresses, value_addresses = addresses.to(keys[0].device)
        return cls(
            key_addresses,
            value_addresses,
            (keys[0].stride(0), keys[0].stride(1)),
            (values[0].stride(0), values[0].stride(1)),
            keys[0].shape[1],
            keys[0].shape[2],
            keys[0].dtype,
        )


@triton.jit(do_not_specialize=["count"])
def _copy_rotated_kernel(
    keys,
    values,
    source,
    target,
    cos,
    sin,
    count,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    DTYPE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NEOX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block of rows, all heads of one layer. Grid: (blocks of rows, layers)."""
    block, layer = tl.program_id(0), tl.program_id(1)
    # A pointer loaded from memory has unknown alignment; without these hints Triton emits scalar loads.
    key = tl.multiple_of(tl.load(keys + layer).to(tl.pointer_type(DTYPE)), 16)
    value = tl.multiple_of(tl.load(values + layer).to(tl.pointer_type(DTYPE)), 16)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < count
    old_slot = tl.load(source + offs_m, mask=mask_m, other=0)
    new_slot = tl.load(target + offs_m, mask=mask_m, other=0)

    # Load the rotation of each row; it is the same for all heads.
    pair = tl.arange(0, BLOCK_R)
    mask_r = mask_m[:, None] & (pair < HALF)[None, :]
    offs_angle = offs_m.to(tl.int64)[:, None] * HALF + pair[None, :]
    c = tl.load(cos + offs_angle, mask=mask_r, other=0.0)
    s = tl.load(sin + offs_angle, mask=mask_r, other=0.0)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = mask_m[:, None] & (offs_d < DIM)[None, :]
    mask_unrotated = mask_m[:, None] & ((offs_d >= 2 * HALF) & (offs_d < DIM))[None, :]
    offs_rotary = tl.arange(0, 2 * BLOCK_R)
    mask_rotary = mask_m[:, None] & (offs_rotary < 2 * HALF)[None, :]
    for head in range(HEADS):
        # Values are copied as they are.
        v = tl.load(value + old_slot[:, None] * stride_vn + head * stride_vh + offs_d[None, :], mask=mask_d)
        tl.store(value + new_slot[:, None] * stride_vn + head * stride_vh + offs_d[None, :], v, mask=mask_d)
        # Keys: the rotary dimensions are rotated in float32.
        read = key + old_slot[:, None] * stride_kn + head * stride_kh
        write = key + new_slot[:, None] * stride_kn + head * stride_kh
        if NEOX:
            a = tl.load(read + pair[None, :], mask=mask_r, other=0.0).to(tl.float32)
            b = tl.load(read + HALF + pair[None, :], mask=mask_r, other=0.0).to(tl.float32)
            tl.store(write + pair[None, :], (a * c - b * s).to(DTYPE), mask=mask_r)
            tl.store(write + HALF + pair[None, :], (b * c + a * s).to(DTYPE), mask=mask_r)
        else:
            # Adjacent dimensions are loaded together and separated in registers.
            k = tl.load(read + offs_rotary[None, :], mask=mask_rotary, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(k, (BLOCK_M, BLOCK_R, 2)))
            k = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (BLOCK_M, 2 * BLOCK_R))
            tl.store(write + offs_rotary[None, :], k.to(DTYPE), mask=mask_rotary)
        # The other dimensions of a key are copied.
        if 2 * HALF < DIM:
            k = tl.load(read + offs_d[None, :], mask=mask_unrotated)
            tl.store(write + offs_d[None, :], k, mask=mask_unrotated)


def copy_rotated_layers(
    pools: Pools,
    source: torch.Tensor,
    target: torch.Tensor,
    rotation: Rotation,
    neox: bool,
) -> None:
    """Copy KV rows between slots of all layers in one launch, rotating the keys in float32.

    Args:
        pools: written in place.
        source: int64 (n,), slots to copy from.
        target: int64 (n,), slots to copy to; distinct, and not among ``source``.
        rotation: of the n rows.
        neox: pairing of the rotary dimensions, see :class:`a3_sglang.rope.RopeTable`.
    """
    count, half = rotation.cos.shape
    if not count:
        return
    _copy_rotated_kernel[(triton.cdiv(count, COPIED_ROWS), len(pools.keys))](
        pools.keys,
        pools.values,
        source,
        target,
        rotation.cos,
        rotation.sin,
        count,
        *pools.key_strides,
        *pools.value_strides,
        DTYPE=DTYPES[pools.dtype],
        HEADS=pools.heads,
        DIM=pools.dim,
        BLOCK_D=triton.next_power_of_2(pools.dim),
        HALF=half,
        BLOCK_R=triton.next_power_of_2(half),
        NEOX=neox,
        BLOCK_M=COPIED_ROWS,
        num_warps=4,
    )
