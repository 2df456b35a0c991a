"""The choice of row attention, the layout of rows for FlashInfer, and the warm-up."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from test_row_attention import batches
from torch.testing import assert_close

from a3_sglang.attention.autotune import NoUsableBackendError, fastest
from a3_sglang.attention.base import AttentionSpec, RowAttention
from a3_sglang.attention.flashinfer import FlashInferRowAttention, PagedRows
from a3_sglang.attention.torch_cpu import TorchRowAttention
from a3_sglang.attention.triton import TritonRowAttention
from a3_sglang.fusion.ops import create_ops
from a3_sglang.fusion.overhead import overhead_rows
from a3_sglang.fusion.warm_up import check_keys, warm_up
from a3_sglang.integration.model_checks import UnsupportedModelError
from a3_sglang.rope import RopeTable
from a3_sglang.selectors import make_selector, selector_names
from helpers.reference import attention64, cos_sin, inverse_frequencies
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


@settings(max_examples=40, deadline=None)
@given(batches())
def test_flashinfer_gets_what_each_row_attends_to(batch):
    """Read back by the rules of FlashInfer's paged prefill with pages of one slot; attention over it in float64."""
    query, keys, values, requests = batch
    paged = PagedRows.of(requests)
    assert paged.row_ends.tolist() == [0, *(request.end for request in requests)]
    assert paged.slots.dtype == torch.int32
    for i, request in enumerate(requests):
        rows, slots = (paged.row_ends[i : i + 2].tolist(), paged.slot_ends[i : i + 2].tolist())
        context = slots[1] - slots[0]
        packed = paged.mask[paged.byte_ends[i] :]
        bits = torch.arange(len(request.kv_lens))[:, None] * context + torch.arange(context)
        unmasked = ((packed[bits // 8] >> (bits % 8)) & 1).bool()
        assert_close(unmasked.sum(1), request.kv_lens)
        own = paged.slots[slots[0] : slots[1]].long()
        # Nothing that is read may hold NaN, masked or not.
        assert not keys[own].isnan().any()
        assert torch.equal(unmasked, torch.arange(context) < request.kv_lens[:, None])
        mine = slice(*rows)
        exact = attention64(
            query[mine], keys[request.slots], values[request.slots], request.kv_lens, AttentionSpec(0.3)
        )
        assert_close(attention64(query[mine], keys[own], values[own], unmasked.sum(1), AttentionSpec(0.3)), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_flashinfer_passes_the_trial(dtype, dim):
    pool = torch.zeros(10, 2, dim, dtype=dtype, device="cuda")
    attention = fastest({"flashinfer": lambda: FlashInferRowAttention("cuda")}, 8, pool, 3)
    assert isinstance(attention, FlashInferRowAttention)


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
