"""The correction of reused rows by the drift of recomputed ones, with both operations, against float64."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.drift import model
from a3_sglang.drift.correction import DriftCorrection, ObservedRows
from a3_sglang.drift.model import DEFAULT
from a3_sglang.fusion.ops import TorchOps, TritonOps
from a3_sglang.rope import RopeTable
from helpers.reference import LAYOUTS, cos_sin, inverse_frequencies, random_tensor, rope64

OPS = {"torch": TorchOps, "triton": TritonOps}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITIONS = 2000
MAX_BLOCK = 60


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans have several blocks, and these are quick in the interpreter."""
    monkeypatch.setattr(model, "MAX_BLOCK", MAX_BLOCK)


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 130), min_size=1, max_size=3),
    share=st.floats(0.02, 0.6),
    gap=st.integers(0, 5),
    **LAYOUTS,
)
def test_reused_rows_are_corrected(name, seed, heads, dims, lengths, share, gap, neox, dtype):
    """Rows of gaps are ignored, even if their slots hold NaN; all other slots stay as they are."""
    (dim, rotary), generator = dims, torch.Generator().manual_seed(seed)
    table = cos_sin(inverse_frequencies(rotary), POSITIONS)
    count = sum(lengths)
    # The reused rows, then a gap; positions before them have slots, too, and are not touched.
    begin, recomputed = 7, torch.rand(count, generator=generator) < share
    recomputed[int(torch.randint(0, count, (1,), generator=generator))] = True
    reused_pos = torch.arange(begin, begin + count)
    observed_pos = torch.cat([reused_pos[recomputed], torch.arange(begin + count, begin + count + gap)])
    free = torch.randperm(begin + count + gap + 9, generator=generator)
    slots = free[: begin + count + gap]
    reused_slots, observed_slots, gap_slots = slots[reused_pos], slots[observed_pos], slots[begin + count :]
    first_row = 3
    rows = torch.arange(first_row, first_row + len(observed_pos))
    pools = [random_tensor(generator, len(free), heads, dim).to(dtype) for _ in "kv"]
    # Keys and values of a pass are adjacent in one tensor.
    fresh = random_tensor(generator, first_row + len(observed_pos) + 1, 2, heads, dim).to(dtype).unbind(1)
    for pool in pools:
        pool[gap_slots] = torch.nan
    wanted_begin, wanted_end = begin + 2, begin + count - count // 3
    wanted = (reused_pos >= wanted_begin) & (reused_pos < wanted_end)

    edges = [begin, *(begin + end for end in accumulate(lengths))]
    observed = ObservedRows(
        list(pairwise(edges)),
        reused_pos.to(DEVICE),
        slots.to(DEVICE),
        observed_pos.to(DEVICE),
        first_row,
        count,
        wanted_begin,
        # Where a slice ends may be known on the device only.
        torch.tensor(wanted_end).to(DEVICE),
    )
    predictor = DriftCorrection.plan(DEFAULT, observed).predictor
    is_reused = torch.arange(len(observed_pos)) < len(observed_pos) - gap
    found, rope = [pool.to(DEVICE, copy=True) for pool in pools], RopeTable(table.float().to(DEVICE), neox)
    correct = OPS[name]().plan_drift_correction(DEFAULT, [observed], dtype)
    correct(tuple(found), tuple(x.to(DEVICE) for x in fresh), rope)

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


def test_requests_of_a_pass_are_corrected_as_each_alone():
    """Their positions overlap, and one slice begins in the middle of its request."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    heads, dim, parts, first_row = 2, 16, [], 0
    free = torch.randperm(400, generator=generator)
    for spans, begin in (([(3, 80), (90, 130)], 0), ([(0, 70)], 31)):
        context = spans[-1][1] + 4
        slots, free = free[:context], free[context:]
        reused = torch.cat([torch.arange(*span) for span in spans])
        observed = reused[torch.rand(len(reused), generator=generator) < 0.3]
        pos = torch.cat([observed[observed >= begin], torch.arange(spans[-1][1], context)])
        tensors = (x.to(DEVICE) for x in (reused, slots, pos))
        parts.append(ObservedRows(spans, *tensors, first_row, len(reused), begin, context))
        first_row += len(pos)
    pools = tuple(random_tensor(generator, 400, heads, dim).float().to(DEVICE) for _ in "kv")
    fresh = tuple(random_tensor(generator, first_row, heads, dim).float().to(DEVICE) for _ in "kv")
    rope = RopeTable(cos_sin(inverse_frequencies(dim), POSITIONS).float().to(DEVICE), True)
    together = [pool.clone() for pool in pools]
    TritonOps().plan_drift_correction(DEFAULT, parts, torch.float32)(tuple(together), fresh, rope)
    for name in OPS:
        alone = [pool.clone() for pool in pools]
        for part in parts:
            OPS[name]().plan_drift_correction(DEFAULT, [part], torch.float32)(tuple(alone), fresh, rope)
        for found, expected, before in zip(together, alone, pools, strict=True):
            assert bool((found != before).any())
            assert_close(found, expected, rtol=1e-4, atol=1e-4 if DEVICE == "cpu" else 1e-2)
