"""Between admission and extend there is no host-device sync.

The fused prefill runs over tensors on PyTorch's device ``meta``, which have a shape but no content, so anything that
needs a value on the host (an item, a mask as index, a copy) fails. Copies in the other direction wait, too, if they are
made by ``torch.tensor``; it is not to be called with a device. Only the launches of kernels are left out.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from a3_sglang.attention.base import RequestRows
from a3_sglang.drift.batched import BatchedCorrection
from a3_sglang.drift.correction import ObservedRows
from a3_sglang.drift.model import DEFAULT
from a3_sglang.drift.selection import ROUNDS, select_batch
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.ops import TritonOps
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.integration import compat
from a3_sglang.rope import RopeTable
from a3_sglang.selectors import Budget, Selector
from a3_sglang.selectors.epic import Epic
from a3_sglang.selectors.probe import Probe
from a3_sglang.selectors.qcfuse import QCFuse
from a3_sglang.selectors.random_rows import Random
from a3_sglang.timing import Timings
from helpers.kernels import KERNELS
from helpers.reference import Llama
from helpers.scenario import Scenario, executor_for


@pytest.fixture(autouse=True)
def no_blocking_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.tensor

    def on_the_host(*args: Any, device: Any = None, **named: Any) -> torch.Tensor:
        assert device is None or torch.device(device).type == "cpu", "torch.tensor waits until the copy is complete"
        return original(*args, device=device, **named)

    monkeypatch.setattr(torch, "tensor", on_the_host)


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would have been launched; nothing is."""
    launched: list[str] = []

    class Kernel:
        """A kernel by its name, which notes its launches."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getitem__(self, _grid: tuple[int, ...]) -> Any:
            return lambda *_, **__: launched.append(self._name)

    for name in KERNELS:
        module = importlib.import_module(f"a3_sglang.kernels.{name}")
        for kernel in [key for key in vars(module) if key.startswith("_") and key.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Kernel(kernel))
    monkeypatch.setattr("a3_sglang.kernels.copy_rotated.Pools.of", lambda keys, values: None)
    return launched


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations that launch something on the device: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alone = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "split", "unbind"}
        if isinstance(out, torch.Tensor) and out.is_meta:
            self.count += not func.is_view and func.overloadpacket.__name__ not in alone
        return out


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
    assert ("_probe_merge_kernel" in no_launches) == (isinstance(selector, (Probe, QCFuse)) and 0 < ratio < 1)
    for kernel in ("_pick_kernel", "_weights_kernel", "_correct_drift_kernel"):
        assert (kernel in no_launches) == (isinstance(selector, Probe) and 0 < ratio < 1)
    assert "_row_attention_kernel" in no_launches


@pytest.mark.parametrize("requests", [1, 5])
def test_selection_and_drift_weights_take_few_launches(requests, no_launches):
    """A few dozen for all requests of a batch, and few more per request; cutting a request's rows needs some."""
    spans = [(7, 1200), (1210, 1900), (1950, 5000)]
    reused = torch.cat([torch.arange(*span) for span in spans]).to("meta")
    lengths, chosen = [end - start for start, end in spans], len(reused) // 7
    with Operations() as selecting:
        select_batch(DEFAULT, [reused.float()] * requests, [lengths] * requests, [chosen] * requests)
    assert selecting.count <= 20 + 2 * requests
    assert no_launches == ["_candidates_kernel", *["_condition_kernel", "_pick_kernel"] * ROUNDS]
    no_launches.clear()
    part = ObservedRows(
        spans, reused, torch.empty(5000, dtype=torch.int64, device="meta"), reused[:chosen], 0, chosen, 7, 5000
    )
    with Operations() as correcting:
        BatchedCorrection(DEFAULT, [part] * requests, torch.bfloat16)
    assert correcting.count <= 40 + 8 * requests
    assert no_launches == ["_invert_kernel", "_weights_kernel"] * 2


def test_a_sync_would_fail(no_launches):
    """The budget of the ratio "auto" depends on the scores, so it needs them on the host."""
    scenario, request = planned(Probe(), "auto")
    model, request = on_meta(scenario, request)
    with pytest.raises(RuntimeError, match="meta tensors"):
        Executor(model, TritonOps()).select([request], Timings())


def test_the_batch_of_a_pass_is_made_without_a_sync():
    rows = torch.empty(5, dtype=torch.int64, device="meta")
    batch = compat.make_extend_batch(rows, rows)
    assert batch.seq_lens_cpu.tolist() == [5]
    on_device = (batch.seq_lens, batch.extend_seq_lens, batch.extend_prefix_lens, batch.out_cache_loc)
    assert all(tensor.device.type == "meta" for tensor in on_device)


def test_a_blocking_copy_would_fail():
    with pytest.raises(AssertionError, match="waits until the copy is complete"):
        torch.tensor([5], device="meta")
