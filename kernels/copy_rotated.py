"""Copies KV between slots in all layers at once, keys turned to their new positions on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from a3_sglang.kernels.common import DTYPES

BLOCK_ROWS = 16
"""Rows that one program takes through all heads of one layer."""
ALIGNED = 16
"""Bytes that are read at a time."""


@dataclass(frozen=True, slots=True)
class Pools:
    """The KV pools of layers that share one rotary table, as a kernel can reach them.

    Attributes:
        keys, values: int64 (layers,), addresses.
        key_strides, value_strides: in elements, of a slot and of a head; head_dim is contiguous.
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
        """Look at pools (slots, heads, head_dim), one of each kind a layer; they must outlive the result.

        Raises:
            ValueError: they differ in more than their addresses, or the kernel cannot read them.
        """
        shapes = {(pool.shape, pool.dtype, pool.stride(), pool.device) for pool in keys}
        shapes_of_values = {(pool.shape, pool.dtype, pool.stride(), pool.device) for pool in values}
        if len(shapes) != 1 or len(shapes_of_values) != 1 or keys[0].shape != values[0].shape:
            raise ValueError("the KV pools of the layers differ in shape, dtype, layout or device")
        if keys[0].stride(2) != 1 or values[0].stride(2) != 1 or keys[0].dtype not in DTYPES:
            raise ValueError(f"KV pools in {keys[0].dtype} with strides {keys[0].stride()} cannot be copied")
        addresses = torch.tensor([[pool.data_ptr() for pool in kind] for kind in (keys, values)], dtype=torch.int64)
        if bool((addresses % ALIGNED).any()):
            raise ValueError(f"KV pools that do not begin at multiples of {ALIGNED} bytes cannot be copied")
        of_keys, of_values = addresses.to(keys[0].device)
        return cls(
            of_keys,
            of_values,
            keys[0].stride()[:2],
            values[0].stride()[:2],
            keys[0].shape[1],
            keys[0].shape[2],
            keys[0].dtype,
        )


@triton.jit(do_not_specialize=["count"])
def _copy_rotated(
    keys,
    values,
    source,
    target,
    cos,
    sin,
    count,
    key_slot,
    key_head,
    value_slot,
    value_head,
    DTYPE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    NEOX: tl.constexpr,
    ROWS: tl.constexpr,
):
    block, layer = tl.program_id(0), tl.program_id(1)
    # An address from memory may be anything: without these promises every element would be read by itself.
    key = tl.multiple_of(tl.load(keys + layer).to(tl.pointer_type(DTYPE)), 16)
    value = tl.multiple_of(tl.load(values + layer).to(tl.pointer_type(DTYPE)), 16)
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < count
    old = tl.load(source + row, mask=live, other=0)
    new = tl.load(target + row, mask=live, other=0)

    pair = tl.arange(0, PAIRS)
    turned = live[:, None] & (pair < HALF)[None, :]
    turn = row.to(tl.int64)[:, None] * HALF + pair[None, :]
    c = tl.load(cos + turn, mask=turned, other=0.0)
    s = tl.load(sin + turn, mask=turned, other=0.0)

    dim = tl.arange(0, WIDTH)
    copied = live[:, None] & (dim < DIM)[None, :]
    kept = live[:, None] & ((dim >= 2 * HALF) & (dim < DIM))[None, :]
    both = tl.arange(0, 2 * PAIRS)
    paired = live[:, None] & (both < 2 * HALF)[None, :]
    for head in range(HEADS):
        v = tl.load(value + old[:, None] * value_slot + head * value_head + dim[None, :], mask=copied)
        tl.store(value + new[:, None] * value_slot + head * value_head + dim[None, :], v, mask=copied)
        read = key + old[:, None] * key_slot + head * key_head
        write = key + new[:, None] * key_slot + head * key_head
        if NEOX:
            a = tl.load(read + pair[None, :], mask=turned, other=0.0).to(tl.float32)
            b = tl.load(read + HALF + pair[None, :], mask=turned, other=0.0).to(tl.float32)
            tl.store(write + pair[None, :], (a * c - b * s).to(DTYPE), mask=turned)
            tl.store(write + HALF + pair[None, :], (b * c + a * s).to(DTYPE), mask=turned)
        else:
            # Neighbours are read side by side and parted in registers.
            k = tl.load(read + both[None, :], mask=paired, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(k, (ROWS, PAIRS, 2)))
            k = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, 2 * PAIRS))
            tl.store(write + both[None, :], k.to(DTYPE), mask=paired)
        if 2 * HALF < DIM:
            k = tl.load(read + dim[None, :], mask=kept)
            tl.store(write + dim[None, :], k, mask=kept)


def copy_rotated_layers(
    pools: Pools,
    source: torch.Tensor,
    target: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    neox: bool,
) -> None:
    """Copy KV rows between slots of all layers in one launch, turning the keys; the arithmetic is float32.

    Args:
        pools: written in place.
        source: int64 (n,), slots to copy from.
        target: int64 (n,), slots to copy to; none twice, none of ``source``.
        turn: cosine and sine of each row's turn, each float32 (n, rotary_dim / 2), contiguous.
        neox: halves of the turned dimensions are paired (True), or neighbours are (False).
    """
    count, half = turn[0].shape
    if not count:
        return
    _copy_rotated[(triton.cdiv(count, BLOCK_ROWS), len(pools.keys))](
        pools.keys,
        pools.values,
        source,
        target,
        *turn,
        count,
        *pools.key_strides,
        *pools.value_strides,
        DTYPE=DTYPES[pools.dtype],
        HEADS=pools.heads,
        DIM=pools.dim,
        WIDTH=triton.next_power_of_2(pools.dim),
        HALF=half,
        PAIRS=triton.next_power_of_2(half),
        NEOX=neox,
        ROWS=BLOCK_ROWS,
        num_warps=4,
    )
