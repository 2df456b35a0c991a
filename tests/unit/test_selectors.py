"""The selectors and the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.attention.relevance import relevance
from a3_sglang.selectors import (
    Budget,
    DenseLayer,
    DenseLayers,
    ProbeLayers,
    ReusedRows,
    Selector,
    make_selector,
    pick,
    selector_names,
)
from a3_sglang.selectors.a3 import A3
from a3_sglang.selectors.budget import AUTO_CAP, AUTO_FLOOR, AUTO_SHARE, AUTO_USUAL
from a3_sglang.selectors.cacheblend import CacheBlend
from a3_sglang.selectors.epic import Epic
from a3_sglang.selectors.full import Full
from a3_sglang.selectors.probe import Probe
from a3_sglang.selectors.prophetkv import ProphetKV
from a3_sglang.selectors.qcfuse import QCFuse
from a3_sglang.selectors.random_rows import Random
from a3_sglang.selectors.reuse import Reuse


def exactly(count: int, reused: int) -> Budget:
    return Budget(reused, count, count)


def single_rows(positions: list[int]) -> ReusedRows:
    """Spans of one row each."""
    return ReusedRows.of([(p, p + 1) for p in positions], "cpu")


def picked_by(selector: Selector, signal: torch.Tensor | None, rows: ReusedRows, count: int) -> torch.Tensor:
    """Positions of the ``count`` rows that a selector picks."""
    return pick(selector, [selector.score(signal, rows)], [rows], [exactly(count, len(rows.positions))])[0]


def test_selectors_by_name():
    expected = {
        "probe": Probe,
        "a3": A3,
        "cacheblend": CacheBlend,
        "epic": Epic,
        "prophetkv": ProphetKV,
        "qcfuse": QCFuse,
        "random": Random,
        "reuse": Reuse,
        "full": Full,
    }
    assert {name: type(make_selector(name)) for name in selector_names()} == expected
    # The order is that of messages and of the documentation.
    assert selector_names() == tuple(expected)


@pytest.mark.parametrize("name", selector_names())
@given(reused=st.integers(0, 100_000), ratio=st.floats(0, 1))
def test_budget_is_the_ratio_rounded_up(name: str, reused: int, ratio: float):
    budget = Budget.of(make_selector(name), ratio, reused)
    count = budget.least
    assert budget == exactly(count, reused)
    assert budget.leaves_choice == (0 < count < reused)
    if name in ("reuse", "full"):
        assert count == (0 if name == "reuse" else reused)
    else:
        assert count - 1 < ratio * reused <= count or count == ratio * reused == 0
        assert count <= reused


@given(st.integers(0, 100_000))
def test_budget_edges(reused: int):
    probe = Probe()
    assert Budget.of(probe, 0.0, reused) == exactly(0, reused)
    assert Budget.of(probe, 1.0, reused) == exactly(reused, reused)
    assert Budget.of(probe, 1e-9, reused) == exactly(min(1, reused), reused)
    auto = Budget.of(probe, "auto", reused)
    assert auto.least == Budget.of(probe, AUTO_FLOOR, reused).least
    assert auto.most == Budget.of(probe, AUTO_CAP, reused).least


@given(st.data())
def test_pick_takes_the_highest_scores_and_of_equal_ones_the_earlier(data: st.DataObject):
    context = data.draw(st.integers(1, 200))
    # Few distinct values, so that ties are the rule.
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.5]), min_size=context, max_size=context))
    positions = sorted(data.draw(st.sets(st.integers(0, context - 1), min_size=1)))
    count = data.draw(st.integers(0, len(positions)))
    rows = single_rows(positions)
    expected = sorted(sorted(positions, key=lambda p: (-scores[p], p))[:count])
    for _ in range(2):
        picked = pick(A3(), [torch.tensor(scores)[rows.positions]], [rows], [exactly(count, len(positions))])[0]
        assert picked.dtype == torch.int64
        assert picked.tolist() == expected


@pytest.mark.parametrize("name", selector_names())
@given(data=st.data())
def test_pick_gives_distinct_reused_rows(name: str, data: st.DataObject):
    selector = make_selector(name)
    positions = sorted(data.draw(st.sets(st.integers(0, 300), min_size=1)))
    count = data.draw(st.integers(0, len(positions)))
    rows = single_rows(positions)
    relevance = torch.rand(301)
    dense = isinstance(selector.needs, DenseLayers)
    score = relevance[rows.positions] if dense else selector.score(relevance, rows)
    picked = pick(selector, [score], [rows], [exactly(count, len(positions))])[0]
    assert picked.dtype == torch.int64
    assert len(picked) == count
    assert picked.tolist() == sorted(set(picked.tolist()) & set(positions))


def test_probe_prefers_rows_at_the_beginning_of_their_span():
    rows = ReusedRows.of([(0, 100), (100, 400)], "cpu")
    relevance = torch.zeros(400)
    # 192 rows after the beginning of its span, a row's drift has 193 ** -0.38 = 1 / 7.39 of the energy there.
    relevance[[0, 292]] = torch.tensor([1.0, 7.3])
    assert picked_by(Probe(), relevance, rows, 1).tolist() == [0]
    relevance[292] = 7.5
    assert picked_by(Probe(), relevance, rows, 1).tolist() == [292]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 40))
def test_epic_takes_the_same_number_of_rows_at_the_head_of_each_span(lengths: list[int], head: int):
    ends = list(accumulate(lengths))
    rows = ReusedRows.of(list(zip([0, *ends], ends, strict=False)), "cpu")
    count = sum(min(head, length) for length in lengths)
    picked = picked_by(Epic(), None, rows, count)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    expected = [s + i for s, length in zip(starts, lengths, strict=True) for i in range(min(head, length))]
    assert picked.tolist() == expected


def test_random_draws_uniformly_and_reproducibly():
    rows = ReusedRows.of([(0, 4000)], "cpu")
    picked = picked_by(Random(), None, rows, 1000)
    assert torch.equal(picked, picked_by(Random(), None, rows, 1000))
    assert not torch.equal(picked, picked_by(Random(seed=1), None, rows, 1000))
    assert all(180 < int(((picked >= a) & (picked < a + 800)).sum()) < 220 + 20 for a in range(0, 4000, 800))


def probe_layers(selector: Selector, windows: Sequence[int | None]) -> tuple[int, ...]:
    return selector.needs.layers(windows) if isinstance(selector.needs, ProbeLayers) else ()


@given(st.integers(1, 200))
def test_probe_reads_a_band_of_middle_layers(depth: int):
    layers = probe_layers(Probe(), [None] * depth)
    assert 1 <= len(layers) <= math.ceil(0.55 * depth) + 1
    assert layers[0] >= 0
    assert layers[-1] < depth
    assert layers == tuple(range(layers[0], layers[-1] + 1))


@given(st.lists(st.sampled_from([None, 512]), min_size=1, max_size=60))
def test_layers_without_a_window_are_read_if_the_band_has_any(windows: list[int | None]):
    for selector in (Probe(), ProphetKV()):
        band, layers = probe_layers(selector, [None] * len(windows)), probe_layers(selector, windows)
        everywhere = [layer for layer in band if windows[layer] is None]
        assert list(layers) == (everywhere or list(band))


def test_probe_band_of_known_models():
    assert probe_layers(Probe(), [None] * 30) == tuple(range(7, 24))
    assert probe_layers(Probe(), [None] * 32) == tuple(range(8, 25))
    assert probe_layers(Probe(ProbeLayers()), [None] * 7) == tuple(range(7))


@given(st.integers(1, 200))
def test_probes_of_published_rules(depth: int):
    measuring = {name: probe_layers(make_selector(name), [None] * depth) for name in ("prophetkv", "qcfuse")}
    assert measuring["prophetkv"] == tuple(range(depth))
    assert measuring["qcfuse"] == tuple(range(depth // 2, min(depth // 2 + 3, depth)))
    others = {name for name in selector_names() if probe_layers(make_selector(name), [None] * depth)} - measuring.keys()
    assert others == {"probe"}


@pytest.mark.parametrize("selector", [ProphetKV(), QCFuse()])
@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_published_probes_take_the_rows_with_the_most_attention(
    selector: Selector, lengths: list[int], asked: int, kv_heads: int, group: int, ratio: float, seed: int
):
    """Row by row from the definition: the mean over the question's rows, summed over heads and layers."""
    generator = torch.Generator().manual_seed(seed)
    ends = list(accumulate(lengths))
    rows = ReusedRows.of(list(zip([0, *ends], ends, strict=False)), "cpu")
    signal, expected = torch.zeros(ends[-1]), torch.zeros(ends[-1], dtype=torch.float64)
    for _ in range(3):
        logits = torch.randn(kv_heads, asked * group, ends[-1] + asked, generator=generator, dtype=torch.float64)
        weights = torch.softmax(logits * 3, -1)
        values = torch.randn(kv_heads, ends[-1] + asked, 8, generator=generator)
        for head in range(kv_heads):
            signal += relevance(weights[head].float(), asked, values[head], mean=True)[: ends[-1]]
            expected += sum(weights[head][i] for i in range(asked * group))[: ends[-1]] / asked
    assert_close(signal.double(), expected, rtol=1e-4, atol=1e-6)
    count = math.ceil(ratio * ends[-1])
    picked = picked_by(selector, signal, rows, count)
    least = expected[picked].min() if count else math.inf
    kept = torch.ones(ends[-1], dtype=torch.bool)
    kept[picked] = False
    assert len(picked) == count
    assert bool((expected[kept] <= least + 1e-6).all())
    assert not selector.corrects_drift


@given(st.data())
def test_auto_follows_the_number_of_rows_that_cover_its_share(data: st.DataObject):
    drawn = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=400)
    relevance = torch.tensor(data.draw(drawn), dtype=torch.float32)
    rows = single_rows(list(range(len(relevance))))
    budget = Budget.of(Probe(), "auto", len(relevance))
    picked = pick(Probe(), [relevance], [rows], [budget])[0]
    count = len(picked)
    assert budget.least <= count <= budget.most
    ranked = relevance.double().sort(descending=True).values
    sums = [0.0, *accumulate(ranked.tolist())]

    def rows_for(share: float) -> int:
        """Geometric mean of the rows that cover the share and the usual ratio, by the definition."""
        needed = max(1, next((i for i, covered in enumerate(sums) if covered >= share * sums[-1]), len(ranked)))
        return min(max(math.ceil((needed * AUTO_USUAL * len(ranked)) ** 0.5), budget.least), budget.most)

    # By rounding of the sums, the share may be covered one row earlier or later.
    assert rows_for(AUTO_SHARE * (1 - 1e-9)) <= count <= rows_for(AUTO_SHARE * (1 + 1e-9))
    # A selector with the default `select` picks exactly the rows with the highest scores.
    highest = pick(A3(), [relevance], [rows], [budget])[0]
    assert_close(relevance[highest].double().sort(descending=True).values, ranked[:count])


def dense_layer(generator: torch.Generator, context: int, tail: int, kv_heads: int, group: int) -> DenseLayer:
    """Random, with every row of the context reused."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 8, generator=generator)

    n = context + tail
    return DenseLayer(
        random(tail, kv_heads * group),
        random(n, kv_heads),
        random(n, kv_heads),
        random(context, kv_heads),
        torch.arange(context),
    )


def some_of(layer: DenseLayer) -> DenseLayer:
    """The same layer with every other row of the context in gaps."""
    return replace(layer, reused=layer.reused[::2])


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_a3_is_the_papers_attention(context: int, tail: int, kv_heads: int, group: int, seed: int):
    """Row by row from the definition: one softmax over concatenated heads, causal, then sums and means of 5."""
    layer = dense_layer(torch.Generator().manual_seed(seed), context, tail, kv_heads, group)
    key = layer.key.double().repeat_interleave(group, 1).flatten(1)
    summed = torch.zeros(context, dtype=torch.float64)
    for i in range(tail):
        q = layer.query[i].double().flatten()
        logits = key[: context + i + 1] @ q / len(q) ** 0.5
        summed += torch.softmax(logits, 0)[:context]
    padded = torch.nn.functional.pad(summed, (2, 2))
    expected = torch.stack([padded[j : j + 5].mean() for j in range(context)])
    rows = single_rows(list(range(context)))
    assert_close(A3().score(layer, rows).double(), expected, rtol=1e-4, atol=1e-6)
    assert_close(A3().score(some_of(layer), rows).double(), expected[::2], rtol=1e-4, atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**31))
def test_cacheblend_is_the_change_of_values(context: int, tail: int, seed: int):
    layer = dense_layer(torch.Generator().manual_seed(seed), context, tail, 2, 2)
    expected = (layer.value[:context] - layer.copied).double().pow(2).flatten(1).sum(1)
    rows = single_rows(list(range(context)))
    assert_close(CacheBlend().score(layer, rows).double(), expected, rtol=1e-4, atol=1e-6)
    assert_close(CacheBlend().score(some_of(layer), rows).double(), expected[::2], rtol=1e-4, atol=1e-6)
