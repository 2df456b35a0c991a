"""The fused prefill of a small Llama against float64 from the definition."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.attention.row_attention import RequestRows
from a3_sglang.drift import model as drift
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.interface import AttentionHook
from a3_sglang.fusion.passes import RecomputePass
from a3_sglang.fusion.request import FusionRequest, Slice
from a3_sglang.matching.plan import MIN_TAIL, Plan, question_ranges
from a3_sglang.selectors import A3, CacheBlend, FreshLayer, Probe, Reuse, Rows, Selector
from a3_sglang.timing import Timings
from helpers.reference import Llama, gaps, reused, spread64
from helpers.world import MIN_SPAN, World, executor_of

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@dataclass(frozen=True)
class Listening(Probe):
    """The probe over layers 1 and 2 of 4, which takes what is highest; keeps the relevance it is given."""

    spreads: ClassVar[bool] = False
    first: float = 0.25
    last: float = 0.75
    reach: float = math.inf
    heard: list[torch.Tensor] = field(default_factory=list, compare=False)

    def pick(self, relevance: torch.Tensor, rows: Rows, budget: range) -> torch.Tensor:
        self.heard.append(relevance.clone())
        return super().pick(relevance, rows, budget)

    def choose(self, scores: torch.Tensor, rows: Rows, count: int) -> torch.Tensor:
        return Selector.choose(self, scores, rows, count)


def kv(model: Llama, job: FusionRequest) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The KV that now lies in the job's slots, NaN for the prompt's tail; float64."""
    tail = torch.full((len(job.tokens) - job.plan.end, *model.keys[0].shape[1:]), torch.nan, dtype=torch.float64)
    keys, values = (
        [torch.cat([layer[job.slots].double(), tail]) for layer in pool] for pool in (model.keys, model.values)
    )
    return keys, values


def context(layers: list[torch.Tensor], plan: Plan) -> torch.Tensor:
    return torch.stack([layer[: plan.end] for layer in layers])


def assert_full_prefill(model: Llama, job: FusionRequest) -> None:
    exact, found = model.prefill64(job.tokens), kv(model, job)
    for part in (0, 1):
        assert_close(context(found[part], job.plan), context(exact[part], job.plan), **TOLERANCE)


pieces = st.lists(st.tuples(st.integers(0, 12), st.integers(MIN_SPAN, 40)), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)
several = settings(max_examples=15, deadline=None)


@several
@given(seeds, st.integers(0, 20), pieces, st.integers(MIN_TAIL, 90))
def test_ratio_one_is_a_full_prefill(seed, prefix, parts, tail):
    world = World(seed)
    executor = executor_of(world)
    job = world.job(world.prompt(prefix, parts, tail), prefix, Probe(), 1.0, executor)
    executor.run([job], Timings())
    assert_close(job.recomputed, reused(job.plan))
    assert job.probed_rows == 0
    assert_full_prefill(world.model, job)


@several
@given(seeds, st.integers(0, 20), pieces, st.integers(MIN_TAIL, 90), st.floats(0, 1))
def test_any_ratio_equals_the_definition(seed, prefix, parts, tail, ratio):
    """Chosen rows and gaps computed over the mix, all others as they were copied."""
    world = World(seed)
    executor = executor_of(world)
    job = world.job(world.prompt(prefix, parts, tail), prefix, Listening(), ratio, executor)
    copied = kv(world.model, job)
    executor.run([job], Timings())
    rows = torch.cat([job.recomputed, gaps(job.plan)]).sort().values
    expected = world.model.rows64(job.tokens, rows, *copied)[:2]
    found = kv(world.model, job)
    kept = torch.tensor(sorted(set(range(job.plan.end)) - set(rows.tolist())), dtype=torch.int64)
    for part in (0, 1):
        assert_close(context(found[part], job.plan), context(expected[part], job.plan), **TOLERANCE)
        before, after = context(copied[part], job.plan)[:, kept], context(found[part], job.plan)[:, kept]
        assert_close(after, before, rtol=0, atol=0)


@dataclass(frozen=True)
class Spreading(Listening):
    spreads: ClassVar[bool] = True


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(0, 20), pieces, st.integers(MIN_TAIL, 60), st.floats(0.05, 0.95), st.booleans())
def test_drift_is_spread_by_the_definition(seed, prefix, parts, tail, ratio, short_blocks):
    block = 7 if short_blocks else drift.BLOCK
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "BLOCK", block)
        world = World(seed)
        executor = executor_of(world)
        job = world.job(world.prompt(prefix, parts, tail), prefix, Spreading(), ratio, executor)
        copied = kv(world.model, job)
        executor.run([job], Timings())
        correct = spread64(world.model, job.plan, job.recomputed, block)
        rows = torch.cat([job.recomputed, gaps(job.plan)]).sort().values
        expected = world.model.rows64(job.tokens, rows, *copied, correct)[:2]
    found = kv(world.model, job)
    for part in (0, 1):
        assert_close(context(found[part], job.plan), context(expected[part], job.plan), **TOLERANCE)


@several
@given(seeds, st.integers(0, 20), pieces, st.integers(MIN_TAIL, 90), st.sampled_from([Probe(), Reuse()]))
def test_ratio_zero_computes_the_gaps_and_nothing_else(seed, prefix, parts, tail, selector):
    world = World(seed)
    executor = executor_of(world)
    # Reuse recomputes nothing at any ratio.
    ratio = 0.7 if isinstance(selector, Reuse) else 0.0
    job = world.job(world.prompt(prefix, parts, tail), prefix, selector, ratio, executor)
    before = [layer.clone() for layer in world.model.keys + world.model.values]
    executor.run([job], Timings())
    assert len(job.recomputed) == 0
    assert world.model.computed == job.plan.gap * world.model.depth
    written = torch.zeros(len(before[0]), dtype=torch.bool)
    written[job.slots[gaps(job.plan)]] = True
    for old, new in zip(before, world.model.keys + world.model.values, strict=True):
        assert_close(new[~written], old[~written], rtol=0, atol=0, equal_nan=True)
        assert torch.isfinite(new[written]).all()


@several
@given(seeds, st.integers(0, 20), pieces, st.integers(MIN_TAIL, 90))
def test_moved_spans_have_fresh_layer_0_kv(seed, prefix, parts, tail):
    world = World(seed)
    job = world.job(world.prompt(prefix, parts, tail), prefix, Reuse(), 0.0, executor_of(world))
    exact, found, spans = world.model.prefill64(job.tokens), kv(world.model, job), reused(job.plan)
    for part in (0, 1):
        assert_close(found[part][0][spans], exact[part][0][spans], **TOLERANCE)
    if any(span.start != span.offset or span.start > 0 for span in job.plan.spans):
        # The test can tell: deeper KV has seen another context.
        assert not torch.allclose(found[1][-1][spans], exact[1][-1][spans], **TOLERANCE)


@several
@given(seeds, st.integers(0, 20), pieces, st.integers(MIN_TAIL, 90), st.floats(0.05, 0.95))
def test_probe_scores_equal_float64(seed, prefix, parts, tail, ratio):
    world = World(seed)
    executor = executor_of(world)
    selector = Listening()
    job = world.job(world.prompt(prefix, parts, tail), prefix, selector, ratio, executor)
    copied = kv(world.model, job)
    executor.run([job], Timings())
    rows = sum(end - start for start, end in question_ranges(job.plan, len(job.tokens)))
    (count,) = selector.budget(ratio, job.plan.reused)
    if count == job.plan.reused:
        assert selector.heard == []
        return
    assert (job.probed_rows, job.probed_layers) == (rows, 3)
    # Gaps have no KV yet, so nothing sees them.
    for part in copied:
        for layer in part:
            layer[gaps(job.plan)] = torch.nan
    attention = world.model.question64(job.plan, job.tokens, *copied)
    group = world.model.shape.heads // world.model.shape.kv_heads
    score = torch.zeros(job.plan.end, dtype=torch.float64)
    for layer in (1, 2):
        sizes = copied[1][layer].nan_to_num().norm(dim=-1).repeat_interleave(group, 1)
        score += (attention[layer].pow(2).mean(0).sqrt() * sizes.T[:, : job.plan.end]).sum(0)
    assert len(selector.heard) == 1
    assert_close(selector.heard[0].double(), score, rtol=1e-4, atol=1e-5)
    # The rows that rank highest are the ones recomputed.
    threshold = score[reused(job.plan)].sort(descending=True).values[count - 1]
    assert len(job.recomputed) == count
    assert (score[job.recomputed] >= threshold - 1e-5).all()
    assert (job.recomputed.diff() > 0).all()


@dataclass(frozen=True)
class Watching(A3):
    """Keeps the layer it measures."""

    seen: list[FreshLayer] = field(default_factory=list, compare=False)

    def measure(self, layer: FreshLayer) -> torch.Tensor:
        self.seen.append(layer)
        return super().measure(layer)


@several
@given(seeds, st.integers(0, 20), pieces, st.integers(MIN_TAIL, 90), st.integers(3, 400))
def test_first_layers_are_those_of_a_full_prefill(seed, prefix, parts, tail, slice_rows):
    world = World(seed)
    executor = executor_of(world, slice_rows)
    selector = Watching()
    job = world.job(world.prompt(prefix, parts, tail), prefix, selector, 0.3, executor)
    copied = kv(world.model, job)[1][1][prefix : job.plan.end].clone()
    executor.run([job], Timings())
    if not job.chooses:
        assert selector.seen == []
        return
    (layer,) = selector.seen
    everything = torch.arange(len(job.tokens))
    empty = [torch.full((len(everything), 2, 8), torch.nan)] * world.model.depth
    keys, values, _, _, queries = world.model.rows64(job.tokens, everything, empty, empty)
    assert_close(layer.query.double(), queries[1][job.plan.end :], **TOLERANCE)
    assert_close(layer.key.double(), keys[1][prefix:], **TOLERANCE)
    assert_close(layer.value.double(), values[1][prefix:], **TOLERANCE)
    spans = reused(job.plan) - prefix
    assert_close(layer.copied.double()[spans], copied[spans], rtol=0, atol=0)


@several
@given(seeds, st.integers(0, 20), pieces, st.integers(MIN_TAIL, 90), st.floats(0.01, 0.9))
def test_behind_the_first_layers_only_chosen_rows_and_gaps_are_fresh(seed, prefix, parts, tail, ratio):
    world = World(seed)
    executor = executor_of(world)
    selector = CacheBlend()
    job = world.job(world.prompt(prefix, parts, tail), prefix, selector, ratio, executor)
    copied, exact = kv(world.model, job), world.model.prefill64(job.tokens)
    change = (exact[1][1] - copied[1][1])[reused(job.plan)].pow(2).flatten(1).sum(1)
    executor.run([job], Timings())
    if not job.chooses:
        return
    (count,) = selector.budget(ratio, job.plan.reused)
    least = change.sort(descending=True).values[count - 1]
    chosen = torch.isin(reused(job.plan), job.recomputed)
    assert len(job.recomputed) == count
    assert (change[chosen] >= least - 1e-5).all()
    for part in (0, 1):
        for layer in range(job.selector.fresh_layers):
            copied[part][layer][: job.plan.end] = exact[part][layer][: job.plan.end]
    rows = torch.cat([job.recomputed, gaps(job.plan)]).sort().values
    expected, found = world.model.rows64(job.tokens, rows, *copied)[:2], kv(world.model, job)
    for part in (0, 1):
        assert_close(context(found[part], job.plan), context(expected[part], job.plan), **TOLERANCE)
    depth, size = world.model.depth, job.plan.end - prefix
    assert job.charged(depth) == pytest.approx((2 * size + (count + job.plan.gap) * (depth - 2)) / (depth * size))


@pytest.mark.parametrize("slice_rows", [20, 8192])
@pytest.mark.parametrize("selector", [Listening(), Probe(0.5, 1.0)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_tail_takes_along_what_is_left_to_recompute(ratio, selector, slice_rows):
    """In one pass with the tails of two requests, one of them not fused, as in passes of their own."""
    seed = torch.seed() % 2**31
    results = []
    for together in (True, False):
        world = World(seed)
        executor = executor_of(world, slice_rows)
        job = world.job(world.prompt(7, [(5, 30), (0, 25)], 40), 7, selector, ratio, executor)
        plain = torch.from_numpy(world.tokens(30)).long()
        tail, whole = torch.arange(job.plan.end, len(job.tokens)), torch.arange(30)
        slots, of_plain = torch.cat([job.slots, world.take(len(tail))]), world.take(30)
        groups = [
            RequestRows(0, len(tail), slots, tail + 1, ratio == 1),
            RequestRows(len(tail), len(tail) + 30, of_plain, whole + 1, True),
        ]
        left: list[Slice] = []
        if together:
            left = executor.prepare([job], Timings(), len(tail) + 30)
        else:
            executor.run([job], Timings())
        with executor.extended(left, groups, torch.cat([slots[tail], of_plain])):
            hidden = world.model.extend(torch.cat([job.tokens[tail], plain]), torch.cat([tail, whole]))
        results.append((hidden, *(torch.stack(part)[:, : job.plan.end] for part in kv(world.model, job))))
        assert_close(hidden[len(tail) :].double(), world.model.prefill64(plain)[2], **TOLERANCE)
        if ratio == 1:
            assert_close(hidden[: len(tail)].double(), world.model.prefill64(job.tokens)[2][tail], **TOLERANCE)
    for one, other in zip(*results, strict=True):
        assert_close(one, other, **TOLERANCE)


def pair(seed: int, ratios: tuple[float, float]) -> tuple[World, Executor, list[FusionRequest]]:
    """Two jobs that share a prefix's length and nothing else; the same world for the same seed."""
    world = World(seed)
    executor = executor_of(world)
    shapes = ((9, [(4, 30), (0, 20)], 40), (0, [(6, 35), (11, 12), (0, 20)], 75))
    jobs = [
        world.job(world.prompt(*shape), shape[0], selector, ratio, executor)
        for shape, ratio, selector in zip(shapes, ratios, (Listening(), Probe(0.5, 1.0)), strict=True)
    ]
    return world, executor, jobs


@pytest.mark.parametrize("ratios", [(0.2, 0.4), (1.0, 0.15), (0.0, 0.5), (0.0, 0.0), (1.0, 1.0)])
def test_a_batch_equals_each_alone(ratios):
    seed = torch.seed() % 2**31
    world, executor, jobs = pair(seed, ratios)
    executor.run(jobs, Timings())
    for number in (0, 1):
        other_world, other_executor, other_jobs = pair(seed, ratios)
        alone = other_jobs[number]
        other_executor.run([alone], Timings())
        assert_close(jobs[number].recomputed, alone.recomputed)
        for together, single in zip(kv(world.model, jobs[number]), kv(other_world.model, alone), strict=True):
            assert_close(context(together, alone.plan), context(single, alone.plan), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slice_rows", [1, 7, 33])
def test_slices_give_the_same_kv(slice_rows):
    seed = torch.seed() % 2**31
    whole_world, whole, whole_jobs = pair(seed, (0.5, 1.0))
    sliced_world, sliced, sliced_jobs = pair(seed, (0.5, 1.0))
    sliced.slice_rows = slice_rows
    passes: list[int] = []
    forward = sliced_world.model.forward

    def counted(tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        if isinstance(attend, RecomputePass):
            passes.append(len(tokens))
        forward(tokens, positions, attend)

    sliced_world.model.forward = counted
    whole.run(whole_jobs, Timings())
    sliced.run(sliced_jobs, Timings())
    rows = sum(len(job.recomputed) + job.plan.gap for job in sliced_jobs)
    assert rows > slice_rows
    assert passes == [slice_rows] * (rows // slice_rows) + [rows % slice_rows] * (rows % slice_rows > 0)
    for one, other in zip(whole_jobs, sliced_jobs, strict=True):
        assert_close(one.recomputed, other.recomputed)
        for a, b in zip(kv(whole_world.model, one), kv(sliced_world.model, other), strict=True):
            assert_close(context(b, one.plan), context(a, one.plan), rtol=1e-5, atol=1e-5)
    assert_full_prefill(sliced_world.model, sliced_jobs[1])


@pytest.mark.parametrize("slice_rows", [1, 5, 16])
def test_each_slice_spreads_its_own_drift(slice_rows):
    world = World(torch.seed() % 2**31)
    executor = executor_of(world, slice_rows)
    job = world.job(world.prompt(9, [(4, 30), (11, 12), (0, 40), (6, 20)], 40), 9, Spreading(), 0.4, executor)
    keys, values = kv(world.model, job)
    executor.run([job], Timings())
    rows = torch.cat([job.recomputed, gaps(job.plan)]).sort().values
    assert len(rows) > slice_rows
    begin = job.plan.prefix
    for part in rows.split(slice_rows):
        later = rows[rows > part[-1]]
        end = int(later[0]) if len(later) else job.plan.end
        chosen = job.recomputed[torch.isin(job.recomputed, part)]
        correct = spread64(world.model, job.plan, chosen, drift.BLOCK, (begin, end))
        keys, values = world.model.rows64(job.tokens, part, keys, values, correct)[:2]
        begin = end
    for expected, found in zip((keys, values), kv(world.model, job), strict=True):
        assert_close(context(found, job.plan), context(expected, job.plan), **TOLERANCE)


# ---- what goes wrong


class FailingProbe(Llama):
    """Fails on every pass that does not write KV."""

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        if not isinstance(attend, RecomputePass):
            raise RuntimeError("the probe's pass failed")
        super().forward(tokens, positions, attend)


@dataclass(frozen=True)
class FailingPick(Listening):
    """Fails once the probe has run."""

    def pick(self, relevance: torch.Tensor, rows: Rows, budget: range) -> torch.Tensor:
        raise IndexError("the rule failed")


@pytest.mark.parametrize("failure", ["model", "selector", "nan"])
def test_what_fails_in_the_choice_can_be_recomputed_in_full(failure):
    """An error reaches the caller, who has every row recomputed."""
    world, executor, jobs = pair(torch.seed() % 2**31, (0.2, 0.3))
    if failure == "model":
        world.model.__class__ = FailingProbe
        jobs = [dataclasses.replace(job, selector=Listening()) for job in jobs]
    elif failure == "selector":
        jobs[1] = dataclasses.replace(jobs[1], selector=FailingPick())
    else:
        poisoned = jobs[1].plan.spans[0]
        world.model.keys[1][jobs[1].slots[poisoned.start + 3], 0, 2] = torch.nan
    with pytest.raises((RuntimeError, IndexError, FloatingPointError)):
        executor.run(jobs, Timings())
    for job in jobs:
        executor.recompute_all(job)
        assert_close(job.recomputed, reused(job.plan))
        assert_full_prefill(world.model, job)


# ---- accounts


@several
@given(seeds, st.integers(0, 20), pieces, st.integers(MIN_TAIL, 90), st.floats(0, 1))
def test_charged_is_what_the_model_computed(seed, prefix, parts, tail, ratio):
    world = World(seed)
    executor = executor_of(world)
    job = world.job(world.prompt(prefix, parts, tail), prefix, Listening(), ratio, executor)
    executor.run([job], Timings())
    depth = world.model.depth
    assert job.charged(depth) * depth * (job.plan.end - prefix) == pytest.approx(world.model.computed)


def test_charged_by_hand():
    world = World(torch.seed() % 2**31)
    job = world.job(world.prompt(10, [(6, 32)], 40), 10, Probe(), 0.5, executor_of(world))
    assert (job.plan.reused + job.plan.gap, job.plan.end - job.plan.prefix) == (38, 38)
    gap = job.plan.gap
    assert job.charged(4) == pytest.approx(gap / 38)
    job.recomputed = reused(job.plan)[:12]
    job.probed_rows, job.probed_layers = 40, 3
    assert job.charged(4) == pytest.approx(((12 + gap) * 4 + 40 * 3) / (4 * 38))


def test_timings_add_up():
    timings = Timings()
    world, executor, jobs = pair(torch.seed() % 2**31, (0.2, 0.3))
    executor.run(jobs, timings)
    first = timings.milliseconds()
    assert min(first["probe_ms"], first["select_ms"], first["recompute_ms"]) > 0
    assert first["copy_ms"] == first["tail_ms"] == 0
    executor.run(jobs, timings)
    assert timings.milliseconds()["recompute_ms"] > first["recompute_ms"]
    assert world.model.computed > 0
