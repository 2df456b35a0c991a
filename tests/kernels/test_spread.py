"""How recomputed rows correct the rows between them, on either device, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.drift.correction import DriftCorrection, DriftPredictor
from a3_sglang.drift.model import BLOCK, PaddedBlocks
from a3_sglang.fusion.ops import TorchOps, TritonOps
from a3_sglang.rope import RopeTable
from helpers.reference import LAYOUTS, cos_sin, inverse_frequencies, random_tensor, rope64

DEVICES = {"torch": TorchOps, "triton": TritonOps}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REACH = 2000


@pytest.mark.parametrize("name", DEVICES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=3),
    share=st.floats(0.02, 0.6),
    gap=st.integers(0, 5),
    **LAYOUTS,
)
def test_reused_rows_are_corrected(name, seed, heads, dims, lengths, share, gap, neox, dtype):
    """Rows of gaps tell nothing, not even when their slots hold no numbers; all other slots stay as they are."""
    (dim, rotary), generator = dims, torch.Generator().manual_seed(seed)
    table = cos_sin(inverse_frequencies(rotary), REACH)
    count = sum(lengths)
    # The reused rows, then a gap: only the order of positions matters.
    positions, chosen = torch.arange(7, 7 + count), torch.rand(count, generator=generator) < share
    chosen[int(torch.randint(0, count, (1,), generator=generator))] = True
    told = torch.cat([positions[chosen], torch.arange(7 + count, 7 + count + gap)])
    free = torch.randperm(count + gap + 9, generator=generator)
    slots, of_gap = free[:count], free[count : count + gap]
    known = torch.cat([slots[chosen], of_gap])
    rows = torch.randperm(len(told) + 4, generator=generator)[: len(told)].sort().values
    pools = [random_tensor(generator, len(free), heads, dim).to(dtype) for _ in "kv"]
    # Keys and values of a pass lie side by side in one tensor.
    fresh = random_tensor(generator, len(told) + 4, 2, heads, dim).to(dtype).unbind(1)
    for pool in pools:
        pool[of_gap] = torch.nan
    wanted = (positions >= 9) & (positions < 7 + count - count // 3)

    blocks = PaddedBlocks(lengths, DEVICE)
    number = torch.cat([torch.arange(count)[chosen], torch.full((gap,), count)])
    drift = DriftPredictor(number.to(DEVICE), blocks, blocks.shape[1], wanted.to(DEVICE))
    real = torch.arange(len(told)) < len(told) - gap
    spread = DriftCorrection(drift, *(x.to(DEVICE) for x in (rows, known, told, real, slots, positions)))
    found, rope = [pool.to(DEVICE, copy=True) for pool in pools], RopeTable(table.float().to(DEVICE), neox)
    DEVICES[name]().spread(tuple(found), tuple(x.to(DEVICE) for x in fresh), spread, rope)

    # Rows tell the others of their block only, and a block may have none that is wanted.
    block_of = torch.cat([i * 10 + torch.arange(length) // BLOCK for i, length in enumerate(lengths)])
    some = bool(torch.isin(block_of[wanted], block_of[chosen]).any())
    back = table[told[real]] * torch.cat([torch.ones(rotary // 2), -torch.ones(rotary // 2)])
    for part, of in enumerate((drift.of_keys, drift.of_values)):
        shown = fresh[part][rows[real]].double() - pools[part][known[real]].double()
        if not part:
            shown = rope64(shown, back, neox)
        moved = of(torch.cat([shown, torch.zeros(gap, heads, dim)]).float().to(DEVICE)).double().cpu()
        if not part:
            moved = rope64(moved, table[positions], neox)
        assert bool(moved[wanted].any()) == some
        assert not moved[~wanted].any()
        expected = pools[part].double()
        expected[slots] += moved
        epsilon = torch.finfo(dtype).eps
        tolerance = 4 * max(epsilon, 1e-3 if DEVICE == "cuda" else 1e-6)
        assert_close(found[part].double().cpu(), expected, rtol=epsilon, atol=tolerance, equal_nan=True)
