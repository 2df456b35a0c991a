"""The fused prefill of a small Llama against float64 from the definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.attention.base import RequestRows
from a3_sglang.drift import model as drift_model
from a3_sglang.drift.model import DriftModel
from a3_sglang.fusion.interface import AttentionHook
from a3_sglang.fusion.passes import RecomputePass
from a3_sglang.fusion.request import Slice
from a3_sglang.matching.plan import MIN_TAIL
from a3_sglang.selectors import ReusedRows
from a3_sglang.selectors.probe import Probe
from a3_sglang.selectors.reuse import Reuse
from a3_sglang.timing import Timings
from helpers.drift import drawn_model, drift_correction64
from helpers.fusion import (
    LAST_LAYERS,
    TOLERANCE,
    RecordingProbe,
    assert_full_prefill,
    context,
    kv,
    pair,
    pieces,
    prefixes,
    run,
    seeds,
    several,
    tails,
)
from helpers.reference import Llama, gaps, reused
from helpers.scenario import Scenario, executor_for


@several
@given(seeds, prefixes, pieces, tails)
def test_ratio_one_is_a_full_prefill(seed, prefix, parts, tail):
    scenario = Scenario(seed)
    executor = executor_for(scenario)
    request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, Probe(), 1.0, executor)
    run(executor, request)
    assert_close(request.recomputed_pos, reused(request.plan))
    assert request.probed_rows == 0
    assert_full_prefill(scenario.model, request)


@several
@given(seeds, prefixes, pieces, tails, st.floats(0, 1))
def test_any_ratio_equals_the_definition(seed, prefix, parts, tail, ratio):
    """Selected rows and gaps are computed over copied and fresh KV; all other rows stay as they were copied."""
    scenario = Scenario(seed)
    executor = executor_for(scenario)
    request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, RecordingProbe(), ratio, executor)
    plan, copied = request.plan, kv(scenario.model, request)
    run(executor, request)
    rows = torch.cat([request.recomputed_pos, gaps(plan)]).sort().values
    expected = scenario.model.rows64(request.tokens, rows, *copied)[:2]
    found = kv(scenario.model, request)
    kept = torch.tensor(sorted(set(range(plan.end)) - set(rows.tolist())), dtype=torch.int64)
    for part in (0, 1):
        assert_close(context(found[part], plan), context(expected[part], plan), **TOLERANCE)
        before, after = context(copied[part], plan)[:, kept], context(found[part], plan)[:, kept]
        assert_close(after, before, rtol=0, atol=0)


@dataclass(frozen=True)
class CorrectingProbe(RecordingProbe):
    corrects_drift: ClassVar[bool] = True


@settings(max_examples=10, deadline=None)
@given(seeds, prefixes, pieces, st.integers(MIN_TAIL, 60), st.floats(0.05, 0.95), st.booleans())
def test_drift_is_corrected_by_the_definition(seed, prefix, parts, tail, ratio, short_blocks):
    block = 7 if short_blocks else drift_model.MAX_BLOCK
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift_model, "MAX_BLOCK", block)
        scenario = Scenario(seed)
        scenario.model.drift = drawn_model(seed)
        executor = executor_for(scenario)
        request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, CorrectingProbe(), ratio, executor)
        copied = kv(scenario.model, request)
        run(executor, request)
        correct = drift_correction64(scenario.model, request.plan, request.recomputed_pos, block)
        rows = torch.cat([request.recomputed_pos, gaps(request.plan)]).sort().values
        expected = scenario.model.rows64(request.tokens, rows, *copied, correct)[:2]
    found = kv(scenario.model, request)
    for part in (0, 1):
        assert_close(context(found[part], request.plan), context(expected[part], request.plan), **TOLERANCE)


@several
@given(seeds, prefixes, pieces, tails, st.sampled_from([Probe(), Reuse()]))
def test_ratio_zero_computes_only_the_gaps(seed, prefix, parts, tail, selector):
    scenario = Scenario(seed)
    executor = executor_for(scenario)
    # Reuse recomputes nothing at any ratio.
    ratio = 0.7 if isinstance(selector, Reuse) else 0.0
    request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, selector, ratio, executor)
    before = [layer.clone() for layer in scenario.model.keys + scenario.model.values]
    run(executor, request)
    assert len(request.recomputed_pos) == 0
    assert scenario.model.computed == request.plan.gap * scenario.model.depth
    written = torch.zeros(len(before[0]), dtype=torch.bool)
    written[request.slots[gaps(request.plan)]] = True
    for old, new in zip(before, scenario.model.keys + scenario.model.values, strict=True):
        assert_close(new[~written], old[~written], rtol=0, atol=0, equal_nan=True)
        assert torch.isfinite(new[written]).all()


@several
@given(seeds, prefixes, pieces, tails)
def test_moved_spans_have_fresh_layer_0_kv(seed, prefix, parts, tail):
    scenario = Scenario(seed)
    request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, Reuse(), 0.0, executor_for(scenario))
    exact, found = scenario.model.prefill64(request.tokens), kv(scenario.model, request)
    spans = reused(request.plan)
    for part in (0, 1):
        assert_close(found[part][0][spans], exact[part][0][spans], **TOLERANCE)
    if any(span.start != span.offset or span.start > 0 for span in request.plan.spans):
        # The test can fail: KV of later layers depends on the context.
        assert not torch.allclose(found[1][-1][spans], exact[1][-1][spans], **TOLERANCE)


@pytest.mark.parametrize("slice_rows", [20, 8192])
@pytest.mark.parametrize("selector", [RecordingProbe(), Probe(LAST_LAYERS)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_leftover_runs_with_the_tails(ratio, selector, slice_rows):
    """In one pass with the tails of two requests, one of them not fused: the same KV as in separate passes."""
    seed = torch.seed() % 2**31
    results = []
    for one_pass in (True, False):
        scenario = Scenario(seed)
        executor = executor_for(scenario, slice_rows)
        request = scenario.request(scenario.prompt(7, [(5, 30), (0, 25)], 40), 7, selector, ratio, executor)
        plain = torch.from_numpy(scenario.tokens(30)).long()
        tail, whole = torch.arange(request.plan.end, len(request.tokens)), torch.arange(30)
        slots, of_plain = torch.cat([request.slots, scenario.take(len(tail))]), scenario.take(30)
        groups = [
            RequestRows(0, len(tail), slots, tail + 1, ratio == 1),
            RequestRows(len(tail), len(tail) + 30, of_plain, whole + 1, True),
        ]
        leftover: list[Slice] = []
        if one_pass:
            executor.select([request], Timings())
            leftover = executor.recompute([request], Timings(), max(0, slice_rows - len(tail) - 30))
        else:
            run(executor, request)
        with executor.with_leftover(leftover, groups, torch.cat([slots[tail], of_plain])):
            hidden = scenario.model.extend(torch.cat([request.tokens[tail], plain]), torch.cat([tail, whole]))
        of_request = (torch.stack(part)[:, : request.plan.end] for part in kv(scenario.model, request))
        results.append((hidden, *of_request))
        assert_close(hidden[len(tail) :].double(), scenario.model.prefill64(plain)[2], **TOLERANCE)
        if ratio == 1:
            assert_close(hidden[: len(tail)].double(), scenario.model.prefill64(request.tokens)[2][tail], **TOLERANCE)
    for one, other in zip(*results, strict=True):
        assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("ratios", [(0.2, 0.4), (1.0, 0.15), (0.0, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_a_batch_equals_each_alone(ratios):
    seed = torch.seed() % 2**31
    scenario, executor, requests = pair(seed, ratios)
    run(executor, *requests)
    for number in (0, 1):
        other_scenario, other_executor, other_requests = pair(seed, ratios)
        alone = other_requests[number]
        run(other_executor, alone)
        assert_close(requests[number].recomputed_pos, alone.recomputed_pos)
        for together, single in zip(kv(scenario.model, requests[number]), kv(other_scenario.model, alone), strict=True):
            assert_close(context(together, alone.plan), context(single, alone.plan), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slice_rows", [1, 7, 33])
def test_slices_give_the_same_kv(slice_rows):
    seed = torch.seed() % 2**31
    whole_scenario, whole, whole_requests = pair(seed, (0.5, 1.0))
    sliced_scenario, sliced, sliced_requests = pair(seed, (0.5, 1.0))
    sliced.slice_rows = slice_rows
    passes: list[int] = []
    forward = sliced_scenario.model.forward

    def counted(tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        if isinstance(attend, RecomputePass):
            passes.append(len(tokens))
        forward(tokens, positions, attend)

    sliced_scenario.model.forward = counted
    run(whole, *whole_requests)
    run(sliced, *sliced_requests)
    rows = sum(len(request.recomputed_pos) + request.plan.gap for request in sliced_requests)
    assert rows > slice_rows
    assert passes == [slice_rows] * (rows // slice_rows) + [rows % slice_rows] * (rows % slice_rows > 0)
    for one, other in zip(whole_requests, sliced_requests, strict=True):
        assert_close(one.recomputed_pos, other.recomputed_pos)
        for a, b in zip(kv(whole_scenario.model, one), kv(sliced_scenario.model, other), strict=True):
            assert_close(context(b, one.plan), context(a, one.plan), rtol=1e-5, atol=1e-5)
    assert_full_prefill(sliced_scenario.model, sliced_requests[1])


@pytest.mark.parametrize("slice_rows", [1, 5, 16])
def test_each_slice_corrects_the_drift_of_its_range(slice_rows):
    scenario = Scenario(torch.seed() % 2**31)
    executor = executor_for(scenario, slice_rows)
    prompt = scenario.prompt(9, [(4, 30), (11, 12), (0, 40), (6, 20)], 40)
    request = scenario.request(prompt, 9, CorrectingProbe(), 0.4, executor)
    plan = request.plan
    keys, values = kv(scenario.model, request)
    run(executor, request)
    rows = torch.cat([request.recomputed_pos, gaps(plan)]).sort().values
    assert len(rows) > slice_rows
    begin = plan.prefix
    for part in rows.split(slice_rows):
        later = rows[rows > part[-1]]
        end = int(later[0]) if len(later) else plan.end
        chosen = request.recomputed_pos[torch.isin(request.recomputed_pos, part)]
        correct = drift_correction64(scenario.model, plan, chosen, drift_model.MAX_BLOCK, (begin, end))
        keys, values = scenario.model.rows64(request.tokens, part, keys, values, correct)[:2]
        begin = end
    for expected, found in zip((keys, values), kv(scenario.model, request), strict=True):
        assert_close(context(found, plan), context(expected, plan), **TOLERANCE)


# ---- errors


class FailingProbe(Llama):
    """Fails in every pass that does not write KV."""

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        if not isinstance(attend, RecomputePass):
            raise RuntimeError("the probe's pass failed")
        super().forward(tokens, positions, attend)


@dataclass(frozen=True)
class FailingSelect(RecordingProbe):
    """Fails after the probe has run."""

    def select(
        self, scores: Sequence[torch.Tensor], rows: Sequence[ReusedRows], counts: Sequence[int], drift: DriftModel
    ) -> list[torch.Tensor]:
        raise IndexError("the rule failed")


@pytest.mark.parametrize("failure", ["model", "selector", "nan"])
def test_after_an_error_everything_can_be_recomputed(failure):
    """An error of the selection reaches the caller, who recomputes every row instead."""
    scenario, executor, requests = pair(torch.seed() % 2**31, (0.2, 0.3))
    if failure == "model":
        scenario.model.__class__ = FailingProbe
        requests = [dataclasses.replace(request, selector=RecordingProbe()) for request in requests]
    elif failure == "selector":
        requests[1] = dataclasses.replace(requests[1], selector=FailingSelect())
    else:
        poisoned = requests[1].plan.spans[0]
        scenario.model.keys[1][requests[1].slots[poisoned.start + 3], 0, 2] = torch.nan
    with pytest.raises((RuntimeError, IndexError, FloatingPointError)):
        run(executor, *requests)
    for request in requests:
        request.select_all()
        executor.recompute([request], Timings())
        assert_close(request.recomputed_pos, reused(request.plan))
        assert_full_prefill(scenario.model, request)
