"""What is measured before rows are selected, against float64: the probe, and the first layers of all rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.matching.plan import question_ranges
from a3_sglang.selectors import DenseLayer, ReusedRows
from a3_sglang.selectors.a3 import A3
from a3_sglang.selectors.cacheblend import CacheBlend
from a3_sglang.selectors.prophetkv import ProphetKV
from a3_sglang.selectors.qcfuse import QCFuse
from helpers.fusion import TOLERANCE, RecordingProbe, context, kv, pieces, prefixes, run, seeds, several, tails
from helpers.reference import gaps, reused
from helpers.scenario import Scenario, executor_for


@several
@given(seeds, prefixes, pieces, tails, st.floats(0.05, 0.95))
def test_probe_scores_equal_float64(seed, prefix, parts, tail, ratio):
    scenario = Scenario(seed)
    executor = executor_for(scenario)
    selector = RecordingProbe()
    request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, selector, ratio, executor)
    copied = kv(scenario.model, request)
    run(executor, request)
    rows = sum(end - start for start, end in question_ranges(request.plan, len(request.tokens)))
    budget = request.budget
    count = budget.least
    assert budget.most == count
    if count == request.plan.reused:
        assert selector.signals == []
        return
    layers = selector.needs.layers(scenario.model.windows)
    assert (request.probed_rows, request.probed_layers) == (rows, layers[-1] + 1)
    # Gaps have no KV yet, so nothing attends to them.
    for part in copied:
        for layer in part:
            layer[gaps(request.plan)] = torch.nan
    attention = scenario.model.question64(request.plan, request.tokens, *copied)
    group = scenario.model.shape.heads // scenario.model.shape.kv_heads
    score = torch.zeros(request.plan.end, dtype=torch.float64)
    for layer in layers:
        sizes = copied[1][layer].nan_to_num().norm(dim=-1).repeat_interleave(group, 1)
        score += (attention[layer].pow(2).mean(0).sqrt() * sizes.T[:, : request.plan.end]).sum(0)
    assert len(selector.signals) == 1
    assert_close(selector.signals[0].double(), score, rtol=1e-4, atol=1e-5)
    # The rows that rank highest are the ones recomputed.
    threshold = score[reused(request.plan)].sort(descending=True).values[count - 1]
    assert len(request.recomputed_pos) == count
    assert (score[request.recomputed_pos] >= threshold - 1e-5).all()
    assert (request.recomputed_pos.diff() > 0).all()


@several
@given(seeds, prefixes, pieces, tails, st.sampled_from([ProphetKV(), QCFuse()]))
def test_published_probes_equal_float64(seed, prefix, parts, tail, selector):
    """The question attends to the prefix and to anchors; its attention over all known rows is averaged."""
    scenario = Scenario(seed | 1)  # A plain model, which is what the papers are about.
    model, executor = scenario.model, executor_for(scenario)
    request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, selector, 0.3, executor)
    copied, plan, total = kv(model, request), request.plan, len(request.tokens)
    run(executor, request)
    asked = [request.tokens[start:end] for start, end in question_ranges(plan, total)]
    tokens = torch.cat([request.tokens[: plan.end], *asked])
    rows = torch.arange(plan.end, len(tokens))
    known = [*range(prefix), *reused(plan).tolist()]
    band = range(model.depth) if isinstance(selector, ProphetKV) else range(model.depth // 2, model.depth)
    anchors = list(range(prefix))
    for span in plan.spans:
        sizes = {
            p: sum(float(copied[0][layer][p].norm(dim=-1).mean()) for layer in band)
            for p in range(span.start, span.end)
        }
        count = len(sizes) if isinstance(selector, ProphetKV) else -(-len(sizes) // 10)
        anchors += sorted(sizes, key=sizes.__getitem__)[:count]

    def seeing(positions: list[int], part: list[torch.Tensor]) -> list[torch.Tensor]:
        seen = torch.full((model.depth, len(tokens), *part[0].shape[1:]), torch.nan, dtype=torch.float64)
        for layer, given_layer in zip(seen, part, strict=True):
            layer[positions] = given_layer[positions]
        return list(seen)

    positions = torch.arange(total - len(rows), total)
    anchored = [seeing(anchors, part) for part in copied]
    keys, _, _, _, queries = model.rows64(tokens, rows, *anchored, positions=positions)
    group, score = model.shape.heads // model.shape.kv_heads, torch.zeros(len(known), dtype=torch.float64)
    for layer in band:
        for i in range(len(rows)):
            seen = torch.cat([copied[0][layer][known], keys[layer][plan.end : plan.end + i + 1]])
            for head in range(model.shape.heads):
                logits = seen[:, head // group] @ queries[layer][i, head] * model.specs[layer].scaling
                score += torch.softmax(logits, 0)[: len(known)] / len(rows)
    assert (request.probed_rows, request.probed_layers) == (len(rows), model.depth)
    assert_close(request.relevance[known[prefix:]].double(), score[prefix:], rtol=1e-4, atol=1e-5)
    threshold = score[prefix:].sort(descending=True).values[request.budget.least - 1]
    assert len(request.recomputed_pos) == request.budget.least
    found = dict(zip(known, score.tolist(), strict=True))
    assert all(found[p] >= threshold - 1e-5 for p in request.recomputed_pos.tolist())


@dataclass(frozen=True)
class RecordingA3(A3):
    """Records the layer it scores."""

    layers: list[DenseLayer] = field(default_factory=list, compare=False)

    def score(self, signal: DenseLayer, rows: ReusedRows) -> torch.Tensor:
        self.layers.append(signal)
        return super().score(signal, rows)


@several
@given(seeds, prefixes, pieces, tails, st.integers(3, 400))
def test_dense_layers_are_those_of_a_full_prefill(seed, prefix, parts, tail, slice_rows):
    scenario = Scenario(seed)
    executor = executor_for(scenario, slice_rows)
    selector = RecordingA3()
    request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, selector, 0.3, executor)
    copied = kv(scenario.model, request)[1][1][prefix : request.plan.end].clone()
    run(executor, request)
    if not request.budget.leaves_choice:
        assert selector.layers == []
        return
    (layer,) = selector.layers
    everything = torch.arange(len(request.tokens))
    empty = [torch.full((len(everything), 2, 8), torch.nan)] * scenario.model.depth
    keys, values, _, _, queries = scenario.model.rows64(request.tokens, everything, empty, empty)
    assert_close(layer.query.double(), queries[1][request.plan.end :], **TOLERANCE)
    assert_close(layer.key.double(), keys[1][prefix:], **TOLERANCE)
    assert_close(layer.value.double(), values[1][prefix:], **TOLERANCE)
    assert_close(layer.reused, reused(request.plan) - prefix)
    assert_close(layer.copied.double()[layer.reused], copied[layer.reused], rtol=0, atol=0)


@several
@given(seeds, prefixes, pieces, tails, st.floats(0.01, 0.9))
def test_after_the_dense_layers_only_selected_rows_and_gaps_are_computed(seed, prefix, parts, tail, ratio):
    scenario = Scenario(seed)
    executor = executor_for(scenario)
    request = scenario.request(scenario.prompt(prefix, parts, tail), prefix, CacheBlend(), ratio, executor)
    copied, exact = kv(scenario.model, request), scenario.model.prefill64(request.tokens)
    change = (exact[1][1] - copied[1][1])[reused(request.plan)].pow(2).flatten(1).sum(1)
    run(executor, request)
    budget = request.budget
    if not budget.leaves_choice:
        return
    count = budget.least
    assert budget.most == count
    least = change.sort(descending=True).values[count - 1]
    chosen = torch.isin(reused(request.plan), request.recomputed_pos)
    assert len(request.recomputed_pos) == count
    assert (change[chosen] >= least - 1e-5).all()
    assert request.dense_layers == 2
    for part in (0, 1):
        for layer in range(request.dense_layers):
            copied[part][layer][: request.plan.end] = exact[part][layer][: request.plan.end]
    rows = torch.cat([request.recomputed_pos, gaps(request.plan)]).sort().values
    expected, found = scenario.model.rows64(request.tokens, rows, *copied)[:2], kv(scenario.model, request)
    for part in (0, 1):
        assert_close(context(found[part], request.plan), context(expected[part], request.plan), **TOLERANCE)
    depth, size = scenario.model.depth, request.plan.end - prefix
    computed = 2 * size + (count + request.plan.gap) * (depth - 2)
    assert request.charged(depth) == pytest.approx(computed / (depth * size))
