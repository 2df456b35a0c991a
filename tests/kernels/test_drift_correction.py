"""The correction of reused rows by the drift of recomputed ones, with both operations, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.drift.correction import DriftCorrection, DriftPredictor
from a3_sglang.drift.model import DEFAULT, MAX_BLOCK, PaddedBlocks
from a3_sglang.fusion.ops import TorchOps, TritonOps
from a3_sglang.rope import RopeTable
from helpers.reference import LAYOUTS, cos_sin, inverse_frequencies, random_tensor, rope64

OPS = {"torch": TorchOps, "triton": TritonOps}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITIONS = 2000


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=3),
    share=st.floats(0.02, 0.6),
    gap=st.integers(0, 5),
    **LAYOUTS,
)
def test_reused_rows_are_corrected(name, seed, heads, dims, lengths, share, gap, neox, dtype):
    """Rows of gaps are ignored, even if their slots hold NaN; all other slots stay as they are."""
    (dim, rotary), generator = dims, torch.Generator().manual_seed(seed)
    table = cos_sin(inverse_frequencies(rotary), POSITIONS)
    count = sum(lengths)
    # The reused rows, then a gap: only the order of positions matters.
    reused_pos, recomputed = torch.arange(7, 7 + count), torch.rand(count, generator=generator) < share
    recomputed[int(torch.randint(0, count, (1,), generator=generator))] = True
    observed_pos = torch.cat([reused_pos[recomputed], torch.arange(7 + count, 7 + count + gap)])
    free = torch.randperm(count + gap + 9, generator=generator)
    reused_slots, gap_slots = free[:count], free[count : count + gap]
    observed_slots = torch.cat([reused_slots[recomputed], gap_slots])
    rows = torch.randperm(len(observed_pos) + 4, generator=generator)[: len(observed_pos)].sort().values
    pools = [random_tensor(generator, len(free), heads, dim).to(dtype) for _ in "kv"]
    # Keys and values of a pass are adjacent in one tensor.
    fresh = random_tensor(generator, len(observed_pos) + 4, 2, heads, dim).to(dtype).unbind(1)
    for pool in pools:
        pool[gap_slots] = torch.nan
    wanted = (reused_pos >= 9) & (reused_pos < 7 + count - count // 3)

    blocks = PaddedBlocks(lengths, DEVICE)
    observed = torch.cat([torch.arange(count)[recomputed], torch.full((gap,), count)])
    predictor = DriftPredictor(DEFAULT, observed.to(DEVICE), blocks, blocks.shape[1], wanted.to(DEVICE))
    is_reused = torch.arange(len(observed_pos)) < len(observed_pos) - gap
    tensors = (rows, observed_slots, observed_pos, is_reused, reused_slots, reused_pos)
    correction = DriftCorrection(predictor, *(x.to(DEVICE) for x in tensors))
    found, rope = [pool.to(DEVICE, copy=True) for pool in pools], RopeTable(table.float().to(DEVICE), neox)
    OPS[name]().correct_drift(tuple(found), tuple(x.to(DEVICE) for x in fresh), correction, rope)

    # Rows are predicted from their own block only, and a block may have no wanted row.
    block_of = torch.cat([i * 10 + torch.arange(length) // MAX_BLOCK for i, length in enumerate(lengths)])
    any_predicted = bool(torch.isin(block_of[wanted], block_of[recomputed]).any())
    back = table[observed_pos[is_reused]] * torch.cat([torch.ones(rotary // 2), -torch.ones(rotary // 2)])
    for part, predict in enumerate((predictor.predict_keys, predictor.predict_values)):
        drift = fresh[part][rows[is_reused]].double() - pools[part][observed_slots[is_reused]].double()
        if not part:
            drift = rope64(drift, back, neox)
        change = predict(torch.cat([drift, torch.zeros(gap, heads, dim)]).float().to(DEVICE)).double().cpu()
        if not part:
            change = rope64(change, table[reused_pos], neox)
        assert bool(change[wanted].any()) == any_predicted
        assert not change[~wanted].any()
        expected = pools[part].double()
        expected[reused_slots] += change
        epsilon = torch.finfo(dtype).eps
        tolerance = 4 * max(epsilon, 1e-3 if DEVICE == "cuda" else 1e-6)
        assert_close(found[part].double().cpu(), expected, rtol=epsilon, atol=tolerance, equal_nan=True)
