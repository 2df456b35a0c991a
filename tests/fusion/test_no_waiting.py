"""Between admission and extend nothing on the host depends on a value that lies on the device.

The fused prefill runs over tensors on PyTorch's device ``meta``: these have a shape and no content, so whatever would
wait for a value (an item, a mask as index, a copy to the host) fails. Only the launches of kernels are left out.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from a3_sglang.attention.row_attention import RequestRows
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.ops import TritonOps
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.rope import RopeTable
from a3_sglang.selectors import Epic, Probe, Random, Selector
from a3_sglang.timing import Timings
from helpers.reference import Llama
from helpers.world import World, executor_of


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would have been launched."""
    launched: list[str] = []

    def stand_in(module: str, name: str, result=lambda *_: None):
        def launch(*args):
            launched.append(name)
            return result(*args)

        monkeypatch.setattr(f"a3_sglang.kernels.{module}.{name}", launch)

    stand_in("copy_rotated", "copy_rotated_layers")
    stand_in("drift_correction", "correct_drift")
    stand_in("probe_attention", "probe_attention", lambda query, *_: torch.empty_like(query))
    stand_in("row_attention", "row_attention", lambda query, *_: torch.empty_like(query))
    monkeypatch.setattr("a3_sglang.kernels.copy_rotated.Pools.of", lambda keys, values: None)
    return launched


def on_meta(world: World, job: FusionRequest) -> tuple[Llama, FusionRequest]:
    """The same model and job without content."""
    model = world.model
    model.weights = {name: weight.to("meta") for name, weight in model.weights.items()}
    model.keys, model.values = ([pool.to("meta") for pool in kind] for kind in (model.keys, model.values))
    table = RopeTable(model.ropes[0].cos_sin.to("meta"), model.neox)
    model.ropes = dict.fromkeys(range(model.depth), table)
    return model, dataclasses.replace(job, tokens=job.tokens.to("meta"), slots=job.slots.to("meta"))


def planned(selector: Selector, ratio: float | str) -> tuple[World, FusionRequest]:
    world = World(torch.seed() % 2**31)
    return world, world.job(world.prompt(7, [(5, 30), (0, 25)], 40), 7, selector, ratio, executor_of(world))


@pytest.mark.parametrize("slice_rows", [9, 8192])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("selector", [Probe(), Epic(), Random()])
def test_a_fused_prefill_never_waits(selector, ratio, slice_rows, no_launches):
    world, job = planned(selector, ratio)
    model, job = on_meta(world, job)
    executor = Executor(model, TritonOps(), slice_rows)
    tail = torch.arange(job.plan.end, len(job.tokens), device="meta")
    left = executor.prepare([job], Timings(), len(tail))
    slots = torch.cat([job.slots, tail])
    with executor.extended(left, [RequestRows(0, len(tail), slots, tail + 1, False)], slots[tail]):
        model.extend(job.tokens[tail], tail)
    assert len(job.recomputed) == selector.budget(ratio, job.plan.reused)[0]
    assert ("probe_attention" in no_launches) == (isinstance(selector, Probe) and 0 < ratio < 1)
    assert ("correct_drift" in no_launches) == (isinstance(selector, Probe) and 0 < ratio < 1)
    assert "row_attention" in no_launches


def test_the_check_would_notice(no_launches, request):
    """A budget that the scores decide needs them on the host."""
    world, job = planned(Probe(), "auto")
    model, job = on_meta(world, job)
    with pytest.raises(RuntimeError, match="meta tensors"):
        Executor(model, TritonOps()).prepare([job], Timings(), 0)
