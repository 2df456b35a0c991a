"""The copy of KV in all layers at once, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.fusion.ops import TorchOps, TritonOps
from a3_sglang.rope import RopeTable
from helpers.reference import LAYOUTS, cos_sin, inverse_frequencies, random_tensor, rope64

OPS = {"torch": TorchOps, "triton": TritonOps}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITIONS = 300


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 3),
    rows=st.integers(1, 90),
    **LAYOUTS,
)
def test_rows_are_copied_and_rotated(name, seed, layers, heads, dims, rows, neox, dtype):
    """Rotation may round twice; values, dimensions after the rotary ones and all other slots are bit-equal."""
    (dim, rotary), generator = dims, torch.Generator().manual_seed(seed)
    table = cos_sin(inverse_frequencies(rotary), POSITIONS)
    rope = RopeTable(table.float().to(DEVICE), neox)
    slots = torch.randperm(2 * rows + 10, generator=generator)
    source, target = slots[:rows], slots[rows : 2 * rows]
    old, new = torch.randint(0, POSITIONS, (2, rows), generator=generator)
    pools = [
        [random_tensor(generator, len(slots), heads, dim).to(dtype).to(DEVICE) for _ in range(layers)] for _ in "kv"
    ]
    before = [[pool.cpu().clone() for pool in kind] for kind in pools]
    ops = OPS[name]()
    rotation = rope.rotation(old.to(DEVICE), new.to(DEVICE))
    ops.copy(ops.pools(*pools), source.to(DEVICE), target.to(DEVICE), rotation, neox)
    quotient = torch.view_as_real(
        torch.complex(*table[new].chunk(2, -1)) / torch.complex(*table[old].chunk(2, -1))
    ).unbind(-1)
    epsilon = torch.finfo(dtype).eps
    for layer in range(layers):
        keys, values = (kind[layer].cpu() for kind in pools)
        expected = rope64(before[0][layer][source], torch.cat(quotient, -1), neox)
        assert_close(keys[target].double(), expected, rtol=epsilon, atol=4 * max(epsilon, 1e-6))
        assert_close(keys[target][..., rotary:], before[0][layer][source][..., rotary:], rtol=0, atol=0)
        assert_close(values[target], before[1][layer][source], rtol=0, atol=0)
        others = torch.ones(len(slots), dtype=torch.bool)
        others[target] = False
        for after, was in ((keys, before[0][layer]), (values, before[1][layer])):
            assert_close(after[others], was[others], rtol=0, atol=0)


def test_pools_that_differ_are_refused():
    keys = [torch.zeros(4, 2, 8), torch.zeros(4, 2, 8, dtype=torch.float16)]
    values = [torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)]
    with pytest.raises(ValueError, match="differ in shape, dtype, layout or device"):
        TritonOps().pools(keys, values)
    with pytest.raises(ValueError, match="cannot be copied"):
        TritonOps().pools([torch.zeros(4, 2, 8).double()], [torch.zeros(4, 2, 8).double()])
