"""Between admission and extend there is no host-device sync.

The fused prefill runs over tensors on PyTorch's device ``meta``, which have a shape but no content, so anything that
needs a value on the host (an item, a mask as index, a copy) fails. Only the launches of kernels are left out.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from a3_sglang.attention.base import RequestRows
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.ops import TritonOps
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.rope import RopeTable
from a3_sglang.selectors import Budget, Selector
from a3_sglang.selectors.epic import Epic
from a3_sglang.selectors.probe import Probe
from a3_sglang.selectors.qcfuse import QCFuse
from a3_sglang.selectors.random_rows import Random
from a3_sglang.timing import Timings
from helpers.reference import Llama
from helpers.scenario import Scenario, executor_for


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would have been launched; nothing is."""
    launched: list[str] = []

    def stand_in(module: str, name: str, result=lambda *_: None):
        def launch(*args, **_named):
            launched.append(name)
            return result(*args)

        monkeypatch.setattr(f"a3_sglang.kernels.{module}.{name}", launch)

    stand_in("copy_rotated", "copy_rotated_layers")
    stand_in("drift_correction", "correct_drift")
    stand_in("probe_attention", "probe_attention", lambda query, *_: torch.empty_like(query))
    stand_in("row_attention", "row_attention", lambda query, *_: torch.empty_like(query))
    monkeypatch.setattr("a3_sglang.kernels.copy_rotated.Pools.of", lambda keys, values: None)
    return launched


def on_meta(scenario: Scenario, request: FusionRequest) -> tuple[Llama, FusionRequest]:
    """The same model and request, without content."""
    model = scenario.model
    model.weights = {name: weight.to("meta") for name, weight in model.weights.items()}
    model.keys, model.values = ([pool.to("meta") for pool in kind] for kind in (model.keys, model.values))
    table = RopeTable(model.ropes[0].cos_sin.to("meta"), model.neox)
    model.ropes = dict.fromkeys(range(model.depth), table)
    return model, dataclasses.replace(request, tokens=request.tokens.to("meta"), slots=request.slots.to("meta"))


def planned(selector: Selector, ratio: float | str) -> tuple[Scenario, FusionRequest]:
    # An odd seed: the kernels know only plain attention.
    scenario = Scenario(2 * (torch.seed() % 2**30) + 1)
    return scenario, scenario.request(
        scenario.prompt(7, [(5, 30), (0, 25)], 40), 7, selector, ratio, executor_for(scenario)
    )


@pytest.mark.parametrize("slice_rows", [9, 8192])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("selector", [Probe(), Epic(), QCFuse(), Random()])
def test_a_fused_prefill_never_syncs(selector, ratio, slice_rows, no_launches):
    scenario, request = planned(selector, ratio)
    model, request = on_meta(scenario, request)
    executor = Executor(model, TritonOps(), slice_rows)
    tail_pos = torch.arange(request.plan.end, len(request.tokens), device="meta")
    executor.select([request], Timings())
    leftover = executor.recompute([request], Timings(), max(0, slice_rows - len(tail_pos)))
    slots = torch.cat([request.slots, tail_pos])
    rows = RequestRows(0, len(tail_pos), slots, tail_pos + 1, False)
    with executor.with_leftover(leftover, [rows], slots[tail_pos]):
        model.extend(request.tokens[tail_pos], tail_pos)
    assert len(request.recomputed_pos) == Budget.of(selector, ratio, request.plan.reused).least
    assert ("probe_attention" in no_launches) == (isinstance(selector, (Probe, QCFuse)) and 0 < ratio < 1)
    assert ("correct_drift" in no_launches) == (isinstance(selector, Probe) and 0 < ratio < 1)
    assert "row_attention" in no_launches


def test_a_sync_would_fail(no_launches):
    """The budget of the ratio "auto" depends on the scores, so it needs them on the host."""
    scenario, request = planned(Probe(), "auto")
    model, request = on_meta(scenario, request)
    with pytest.raises(RuntimeError, match="meta tensors"):
        Executor(model, TritonOps()).select([request], Timings())
