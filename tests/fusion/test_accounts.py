"""The charged budget and the timings of a fused prefill."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a3_sglang.selectors.probe import Probe
from a3_sglang.timing import Timings
from helpers.fusion import RecordingProbe, pair, pieces, prefixes, run, seeds, several, tails
from helpers.reference import reused
from helpers.scenario import Scenario, executor_for


@several
@given(seeds, prefixes, pieces, tails, st.floats(0, 1))
def test_charged_is_what_the_model_computed(seed, prefix, parts, tail, ratio):
    scenario = Scenario(seed)
    executor = executor_for(scenario)
    request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, RecordingProbe(), ratio, executor)
    run(executor, request)
    depth = scenario.model.depth
    assert request.charged(depth) * depth * (request.plan.end - prefix) == pytest.approx(scenario.model.computed)


def test_charged_by_hand():
    scenario = Scenario(torch.seed() % 2**31)
    request = scenario.request(scenario.prompt(10, [(6, 32)], 40), 10, Probe(), 0.5, executor_for(scenario))
    plan, gap = request.plan, request.plan.gap
    assert (plan.reused + gap, plan.end - plan.prefix) == (38, 38)
    assert request.charged(4) == pytest.approx(gap / 38)
    request.recomputed_pos = reused(plan)[:12]
    request.probed_rows, request.probed_layers = 40, 3
    assert request.charged(4) == pytest.approx(((12 + gap) * 4 + 40 * 3) / (4 * 38))


def test_timings_add_up():
    timings = Timings()
    scenario, executor, requests = pair(torch.seed() % 2**31, (0.2, 0.3))
    run(executor, *requests, timings=timings)
    first = timings.milliseconds()
    assert min(first["probe_ms"], first["select_ms"], first["recompute_ms"]) > 0
    assert first["copy_ms"] == first["tail_ms"] == 0
    run(executor, *requests, timings=timings)
    assert timings.milliseconds()["recompute_ms"] > first["recompute_ms"]
    assert scenario.model.computed > 0
