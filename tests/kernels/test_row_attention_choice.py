"""Which row attention is kept, and how FlashInfer is told which rows there are."""

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
from a3_sglang.attention.flashinfer import FlashInferRowAttention, PagedRows
from a3_sglang.attention.row_attention import RowAttention, TorchRowAttention, TritonRowAttention
from a3_sglang.fusion.interface import UnsupportedModelError
from a3_sglang.fusion.ops import create_ops
from a3_sglang.fusion.overhead import overhead_rows
from a3_sglang.fusion.warm_up import warm_up
from a3_sglang.selectors import make_selector, selector_names
from helpers.reference import attention64
from helpers.scenario import Scenario, executor_for

POOL = torch.zeros(10, 2, 16)
SMALL = {"heads": 4, "pool": POOL, "layers": 2, "contexts": (90, 40)}


class Off(TorchRowAttention):
    """Sees one position less than it should."""

    def plan(self, groups, heads, kv_heads, dtype):
        less = [replace(group, visible=(group.visible - 1).clamp(min=1)) for group in groups]
        return super().plan(less, heads, kv_heads, dtype)


class Nan(RowAttention):
    def plan(self, groups, heads, kv_heads, dtype):
        return lambda query, *_: torch.full_like(query, torch.nan)


class Slow(TorchRowAttention):
    def plan(self, groups, heads, kv_heads, dtype):
        attend = super().plan(groups, heads, kv_heads, dtype)
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


def test_none_that_fits_is_refused_with_every_reason():
    with pytest.raises(
        NoUsableBackendError, match=r"missing: ImportError: no such library; nan: off by nan from float32"
    ):
        fastest({"missing": missing, "nan": Nan}, **SMALL)


def test_the_kernel_passes_the_trial():
    assert type(fastest({"triton": TritonRowAttention}, **SMALL)) is TritonRowAttention


def test_a_cpu_has_no_choice():
    assert type(create_ops(POOL, 4, 2, "auto").rows) is TorchRowAttention
    with pytest.raises(ValueError, match="row_attention=flashinfer needs a CUDA device; leave it at auto"):
        create_ops(POOL, 4, 2, "flashinfer")


@settings(max_examples=40, deadline=None)
@given(batches())
def test_flashinfer_is_told_what_each_row_sees(batch):
    """Read back by the rules of FlashInfer's paged prefill with pages of one slot, and attended to in float64."""
    query, keys, values, groups = batch
    paged = PagedRows.of(groups)
    assert paged.row_ends.tolist() == [0, *(group.end for group in groups)]
    assert paged.slots.dtype == torch.int32
    for i, group in enumerate(groups):
        rows, slots = (paged.row_ends[i : i + 2].tolist(), paged.slot_ends[i : i + 2].tolist())
        context = slots[1] - slots[0]
        packed = paged.mask[paged.byte_ends[i] :]
        places = torch.arange(len(group.visible))[:, None] * context + torch.arange(context)
        seen = ((packed[places // 8] >> (places % 8)) & 1).bool()
        assert_close(seen.sum(1), group.visible)
        own = paged.slots[slots[0] : slots[1]].long()
        # Nothing that is read may hold NaN, masked or not.
        assert not keys[own].isnan().any()
        visible = torch.arange(context) < group.visible[:, None]
        assert torch.equal(seen, visible)
        mine = slice(*rows)
        exact = attention64(query[mine], keys[group.slots], values[group.slots], group.visible, 0.3)
        assert_close(attention64(query[mine], keys[own], values[own], seen.sum(1), 0.3), exact)


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
    """In rows of plain prefills of several lengths; a choice that takes long shows in it."""
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
def test_a_model_whose_keys_turn_otherwise_is_refused(factor):
    """Not at all, or twice as far as its table says."""
    scenario = Scenario(torch.seed() % 2**31)
    for pool in (*scenario.model.keys, *scenario.model.values):
        pool.zero_()
    hidden = scenario.model.hidden
    scenario.model.hidden = lambda tokens, positions, attend: hidden(tokens, factor * positions, attend)
    with pytest.raises(UnsupportedModelError, match="are not rotated as its RoPE says"):
        warm_up(executor_for(scenario), make_selector("probe"))


def test_a_warm_up_hides_nothing():
    scenario = Scenario(torch.seed() % 2**31)

    def fails(*_):
        raise RuntimeError("no kernel image for this device")

    executor = executor_for(scenario)
    executor.ops.questions.plan = fails
    with pytest.raises(RuntimeError, match="no kernel image"):
        warm_up(executor, make_selector("probe"))
