"""The choice of row attention, and the warm-up."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest
import torch

from a3_sglang.attention.autotune import NoUsableBackendError, fastest
from a3_sglang.attention.base import RowAttention
from a3_sglang.attention.flashinfer import FlashInferRowAttention
from a3_sglang.attention.registry import ROW_ATTENTION, VARIANTS
from a3_sglang.attention.torch_cpu import TorchRowAttention
from a3_sglang.attention.triton import TritonRowAttention
from a3_sglang.fusion.ops import create_ops
from a3_sglang.fusion.overhead import overhead_rows
from a3_sglang.fusion.warm_up import check_keys, warm_up
from a3_sglang.integration.model_checks import UnsupportedModelError
from a3_sglang.rope import RopeTable
from a3_sglang.selectors import make_selector, selector_names
from helpers.paged import PrefillWrapper
from helpers.reference import cos_sin, inverse_frequencies
from helpers.scenario import Scenario, executor_for

POOL = torch.zeros(10, 2, 16)
SMALL = {"heads": 4, "pool": POOL, "layers": 2, "contexts": (90, 40)}


class Off(TorchRowAttention):
    """Attends to one position less than it should."""

    def plan(self, requests, heads, kv_heads, dtype):
        less = [replace(request, kv_lens=(request.kv_lens - 1).clamp(min=1)) for request in requests]
        return super().plan(less, heads, kv_heads, dtype)


class Nan(RowAttention):
    def plan(self, requests, heads, kv_heads, dtype):
        return lambda query, *_: torch.full_like(query, torch.nan)


class Slow(TorchRowAttention):
    def plan(self, requests, heads, kv_heads, dtype):
        attend = super().plan(requests, heads, kv_heads, dtype)
        return lambda *given: [attend(*given) for _ in range(50)][-1]


def missing() -> RowAttention:
    raise ImportError("no such library")


def test_the_fastest_right_one_is_kept(caplog):
    candidates = {"slow": Slow, "off": Off, "missing": missing, "nan": Nan, "torch": TorchRowAttention}
    with caplog.at_level(logging.INFO):
        kept = fastest(candidates, **SMALL)
    assert type(kept) is TorchRowAttention
    assert "off is not used: off by" in caplog.text
    assert "missing is not used: ImportError: no such library" in caplog.text
    assert "nan is not used" in caplog.text
    assert "row attention by torch (slow" in caplog.text


def test_no_usable_backend_is_refused_with_every_reason():
    with pytest.raises(
        NoUsableBackendError, match=r"missing: ImportError: no such library; nan: off by nan from float32"
    ):
        fastest({"missing": missing, "nan": Nan}, **SMALL)


def test_the_kernel_passes_the_trial():
    assert type(fastest({"triton": TritonRowAttention}, **SMALL)) is TritonRowAttention


def test_a_cpu_has_one_row_attention():
    assert type(create_ops(POOL, 4, 2, "auto").row_attention) is TorchRowAttention
    with pytest.raises(ValueError, match="row_attention=flashinfer needs a CUDA device; leave it at auto"):
        create_ops(POOL, 4, 2, "flashinfer")


def test_flashinfer_needs_a_head_size_that_it_has():
    attention = FlashInferRowAttention(torch.device("cpu"), PrefillWrapper)
    with pytest.raises(
        NoUsableBackendError, match=r"flashinfer: ValueError: FlashInfer has no prefill for heads of 16"
    ):
        fastest({"flashinfer": lambda: attention}, **SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROW_ATTENTION | VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_libraries_pass_the_trial(name, dtype, dim):
    if name == "fa3" and torch.cuda.get_device_capability()[0] not in (8, 9):
        pytest.skip("FlashAttention 3 is built for other GPUs")
    make = (ROW_ATTENTION | VARIANTS)[name]
    pool = torch.zeros(10, 2, dim, dtype=dtype, device="cuda")
    fastest({name: lambda: make(pool.device)}, 8, pool, 3)


@pytest.mark.parametrize("name", selector_names())
def test_a_warm_up_runs_a_fused_prefill(name):
    scenario = Scenario(torch.seed() % 2**31)
    for pool in (*scenario.model.keys, *scenario.model.values):
        pool.zero_()
    job = warm_up(executor_for(scenario), make_selector(name))
    assert job.plan.reused > 0
    assert job.plan.gap > 0
    for pool in (*scenario.model.keys, *scenario.model.values):
        assert bool(pool.isfinite().all())
        assert bool(pool[job.slots].any())


def test_the_overhead_of_a_fusion_is_measured():
    """In rows of plain prefills of several lengths; it includes the time of the choice."""
    scenario = Scenario(torch.seed() % 2**31)
    for pool in (*scenario.model.keys, *scenario.model.values):
        pool.zero_()
    executor, computed = executor_for(scenario), []
    forward = scenario.model.hidden

    def counted(tokens, positions, attend):
        computed.append(len(tokens))
        return forward(tokens, positions, attend)

    scenario.model.hidden = counted
    overhead = overhead_rows(executor, make_selector("probe"))
    assert max(computed) >= 2 * min(computed)
    select = executor.select

    def slow(*args):
        time.sleep(0.2)
        select(*args)

    executor.select = slow
    assert overhead_rows(executor, make_selector("probe")) > overhead >= 0


@pytest.mark.parametrize("factor", [0, 2])
def test_a_model_that_rotates_otherwise_is_refused(factor):
    """Its keys are not rotated, or twice as far as its table says."""
    scenario = Scenario(torch.seed() % 2**31)
    for pool in (*scenario.model.keys, *scenario.model.values):
        pool.zero_()
    hidden, reach = scenario.model.hidden, scenario.model.shape.positions
    scenario.model.hidden = lambda tokens, positions, attend: hidden(tokens, factor * positions % reach, attend)
    with pytest.raises(UnsupportedModelError, match="layer 0 attends do not follow its RoPE"):
        warm_up(executor_for(scenario), make_selector("probe"))


def test_a_model_with_one_layer_that_rotates_otherwise_is_refused():
    scenario = Scenario(torch.seed() % 2**31)
    shape = scenario.model.shape
    other = RopeTable(cos_sin(inverse_frequencies(shape.head_dim, 2 * shape.base), shape.positions).float(), True)
    scenario.model.ropes[2] = other
    with pytest.raises(UnsupportedModelError, match="layer 2 attends do not follow its RoPE"):
        check_keys(scenario.model)


def test_a_warm_up_hides_nothing():
    scenario = Scenario(torch.seed() % 2**31)

    def fails(*_, **__):
        raise RuntimeError("no kernel image for this device")

    executor = executor_for(scenario)
    executor.ops.probe_attention.plan = fails
    with pytest.raises(RuntimeError, match="no kernel image"):
        warm_up(executor, make_selector("probe"))
