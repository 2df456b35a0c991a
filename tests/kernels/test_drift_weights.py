"""The weights of kriging by kernels against the solution of the same systems in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.drift import model
from a3_sglang.drift.batched import BatchedCorrection
from a3_sglang.drift.correction import ObservedRows
from a3_sglang.kernels.drift_weights import WIDTH_UNIT
from helpers.drift import drawn_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def parts(draw: st.DrawFn):
    """Rows of some requests, with gaps before, between and after their spans."""
    observed, row = [], 0
    for _ in range(draw(st.integers(1, 2))):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        spans, end = [], 0
        for length in draw(st.lists(st.integers(1, 200), min_size=1, max_size=3)):
            start = end + draw(st.integers(0, 40))
            end = start + length
            spans.append((start, end))
        context = end + draw(st.integers(0, 9))
        reused = torch.cat([torch.arange(*span) for span in spans])
        chosen = torch.zeros(context, dtype=torch.bool)
        chosen[reused] = torch.rand(len(reused), generator=generator) < draw(st.floats(0, 0.6))
        gaps = torch.ones(context, dtype=torch.bool)
        gaps[reused] = False
        pos = (chosen | gaps).nonzero().squeeze(1)
        begin, end = sorted(torch.randint(0, context + 1, (2,), generator=generator).tolist())
        slots = torch.randperm(context, generator=generator)
        tensors = (part.to(DEVICE) for part in (reused, slots, pos))
        observed.append(ObservedRows(spans, *tensors, row, len(reused), begin, end))
        row += len(pos)
    return observed


def weights64(kind, part, offset, start, rows):
    """Weights (rows, observed) of the block of ``rows`` rows at position ``start``."""
    pos = part.pos.cpu()
    inside = pos[(pos >= start) & (pos < start + rows)] - start + offset
    offsets = torch.arange(offset, offset + rows)

    def scale(x):
        # Of float32, as kernels have it.
        return kind.scale(x).double()

    def covariance(a, b):
        distance = (a[:, None] - b).abs().double()
        local = kind.local_sill * scale(a)[:, None] * scale(b)
        return kind.shared_sill * (-distance / kind.shared_range).exp() + local * (-distance / kind.local_range).exp()

    nugget = (1 - kind.shared_sill - kind.local_sill) * scale(inside).square()
    among = covariance(inside, inside) + nugget.diag()
    weights = kind.damping * covariance(offsets, inside) @ torch.linalg.inv(among)
    position = torch.arange(start, start + rows)
    weights[(position < part.begin_pos) | (position >= part.end_pos)] = 0
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(parts(), st.sampled_from([40, 120]), st.integers(0, 2**31))
def test_weights_equal_float64(dtype, observed, longest, seed):
    drift = drawn_model(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "MAX_BLOCK", longest)
        found = BatchedCorrection(drift, observed, dtype)._weights
    block = 0
    for part in observed:
        for start, end in part.spans:
            for begin in range(start, end, longest):
                rows = min(longest, end - begin)
                for kind, weights in zip((drift.keys, drift.values), found, strict=True):
                    expected = weights64(kind, part, begin - start, begin, rows)
                    count = expected.shape[1]
                    mine = weights[block, :rows].double().cpu()
                    tolerance = {"rtol": 1e-3, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
                    assert_close(mine[:, :count], expected, **tolerance)
                    assert not mine[:, count : count + -count % WIDTH_UNIT].any()
                block += 1
    assert block == len(found[0])
    assert found[0].shape[2] % WIDTH_UNIT == 0
