"""The rules that rank reused rows."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.selectors import (
    A3,
    CacheBlend,
    Epic,
    FreshLayer,
    Full,
    Probe,
    Random,
    Reuse,
    Rows,
    Selector,
    make_selector,
    selector_names,
)
from a3_sglang.selectors.base import AUTO_CAP, AUTO_FLOOR, AUTO_SHARE, AUTO_USUAL

SELECTORS = [make_selector(name) for name in selector_names()]


def exactly(count: int) -> range:
    return range(count, count + 1)


def test_names_make_what_they_say():
    expected = {
        "probe": Probe,
        "a3": A3,
        "cacheblend": CacheBlend,
        "epic": Epic,
        "random": Random,
        "reuse": Reuse,
        "full": Full,
    }
    assert {name: type(make_selector(name)) for name in selector_names()} == expected
    assert all(make_selector(name).name == name for name in selector_names())


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.name)
@given(reused=st.integers(0, 100_000), ratio=st.floats(0, 1))
def test_budget_is_the_ratio_rounded_up(selector: Selector, reused: int, ratio: float):
    (count,) = selector.budget(ratio, reused)
    if selector.name in ("reuse", "full"):
        assert count == (0 if selector.name == "reuse" else reused)
    else:
        assert count - 1 < ratio * reused <= count or count == ratio * reused == 0
        assert count <= reused


@given(st.integers(0, 100_000))
def test_budget_edges(reused: int):
    probe = Probe()
    assert probe.budget(0.0, reused) == exactly(0)
    assert probe.budget(1.0, reused) == exactly(reused)
    assert probe.budget(1e-9, reused) == exactly(min(1, reused))
    auto = probe.budget("auto", reused)
    assert auto[0] == probe.budget(AUTO_FLOOR, reused)[0]
    assert auto[-1] == probe.budget(AUTO_CAP, reused)[0]


@given(st.data())
def test_pick_takes_the_highest_and_of_equals_the_earlier(data: st.DataObject):
    context = data.draw(st.integers(1, 200))
    # Few distinct values, so that ties are the rule.
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.5]), min_size=context, max_size=context))
    positions = sorted(data.draw(st.sets(st.integers(0, context - 1), min_size=1)))
    count = data.draw(st.integers(0, len(positions)))
    rows = Rows.of([(p, p + 1) for p in positions], "cpu")
    expected = sorted(sorted(positions, key=lambda p: (-scores[p], p))[:count])
    for _ in range(2):
        picked = A3().pick(torch.tensor(scores), rows, exactly(count))
        assert picked.dtype == torch.int64
        assert picked.tolist() == expected


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.name)
@given(data=st.data())
def test_pick_gives_distinct_reused_rows(selector: Selector, data: st.DataObject):
    positions = sorted(data.draw(st.sets(st.integers(0, 300), min_size=1)))
    count = data.draw(st.integers(0, len(positions)))
    rows = Rows.of([(p, p + 1) for p in positions], "cpu")
    picked = selector.pick(torch.rand(301), rows, exactly(count))
    assert picked.dtype == torch.int64
    assert len(picked) == count
    assert picked.tolist() == sorted(set(picked.tolist()) & set(positions))


def test_probe_prefers_rows_at_the_beginning_of_their_span():
    rows = Rows.of([(0, 100), (100, 400)], "cpu")
    relevance = torch.zeros(400)
    # 192 rows behind its beginning a row drifts by 193 ** -0.38 of the energy at the beginning, which is 1 / 7.39.
    relevance[[0, 292]] = torch.tensor([1.0, 7.3])
    assert Probe().pick(relevance, rows, exactly(1)).tolist() == [0]
    relevance[292] = 7.5
    assert Probe().pick(relevance, rows, exactly(1)).tolist() == [292]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 40))
def test_epic_takes_as_many_rows_at_the_head_of_every_span(lengths: list[int], head: int):
    ends = list(accumulate(lengths))
    rows = Rows.of(list(zip([0, *ends], ends, strict=False)), "cpu")
    count = sum(min(head, length) for length in lengths)
    picked = Epic().pick(torch.zeros(sum(lengths)), rows, exactly(count))
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    expected = [s + i for s, length in zip(starts, lengths, strict=True) for i in range(min(head, length))]
    assert picked.tolist() == expected


def test_random_draws_evenly_and_again():
    rows = Rows.of([(0, 4000)], "cpu")
    nothing = torch.zeros(4000)
    picked = Random().pick(nothing, rows, exactly(1000))
    assert torch.equal(picked, Random().pick(nothing, rows, exactly(1000)))
    assert not torch.equal(picked, Random(seed=1).pick(nothing, rows, exactly(1000)))
    assert all(180 < int(((picked >= a) & (picked < a + 800)).sum()) < 220 + 20 for a in range(0, 4000, 800))


@given(st.integers(1, 200))
def test_probe_reads_a_band_of_middle_layers(depth: int):
    layers = Probe().probe_layers(depth)
    assert 1 <= len(layers) <= math.ceil(0.55 * depth) + 1
    assert layers.start >= 0
    assert layers.stop <= depth
    assert layers.step == 1


def test_probe_band_of_known_models():
    assert Probe().probe_layers(30) == range(7, 24)
    assert Probe().probe_layers(32) == range(8, 25)
    assert Probe(first=0.0, last=1.0).probe_layers(7) == range(7)


@given(st.integers(1, 200))
def test_only_the_probe_asks_for_one(depth: int):
    assert [s.name for s in SELECTORS if len(s.probe_layers(depth))] == ["probe"]


@given(st.data())
def test_auto_follows_the_rows_that_cover_its_share(data: st.DataObject):
    drawn = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=400)
    relevance = torch.tensor(data.draw(drawn), dtype=torch.float32)
    rows = Rows.of([(p, p + 1) for p in range(len(relevance))], "cpu")
    budget = Probe().budget("auto", len(relevance))
    picked = Probe().pick(relevance, rows, budget)
    count = len(picked)
    assert count in budget
    ranked = relevance.double().sort(descending=True).values
    sums = [0.0, *accumulate(ranked.tolist())]

    def rows_for(share: float) -> int:
        """Between them and the usual ratio, by the definition."""
        needed = max(1, next((i for i, covered in enumerate(sums) if covered >= share * sums[-1]), len(ranked)))
        return min(max(math.ceil((needed * AUTO_USUAL * len(ranked)) ** 0.5), budget[0]), budget[-1])

    # Sums round: a share may be reached a row earlier or later.
    assert rows_for(AUTO_SHARE * (1 - 1e-9)) <= count <= rows_for(AUTO_SHARE * (1 + 1e-9))
    # A rule without an order of its own takes those very rows.
    assert_close(relevance[A3().pick(relevance, rows, budget)].double().sort(descending=True).values, ranked[:count])


def fresh_layer(generator: torch.Generator, context: int, tail: int, kv_heads: int, group: int) -> FreshLayer:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 8, generator=generator)

    n = context + tail
    return FreshLayer(
        random(tail, kv_heads * group), random(n, kv_heads), random(n, kv_heads), random(context, kv_heads)
    )


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_a3_is_the_papers_attention(context: int, tail: int, kv_heads: int, group: int, seed: int):
    """Row by row from the definition: one softmax over concatenated heads, causal, then sums and means of 5."""
    layer = fresh_layer(torch.Generator().manual_seed(seed), context, tail, kv_heads, group)
    key = layer.key.double().repeat_interleave(group, 1).flatten(1)
    summed = torch.zeros(context, dtype=torch.float64)
    for i in range(tail):
        q = layer.query[i].double().flatten()
        logits = key[: context + i + 1] @ q / len(q) ** 0.5
        summed += torch.softmax(logits, 0)[:context]
    padded = torch.nn.functional.pad(summed, (2, 2))
    expected = torch.stack([padded[j : j + 5].mean() for j in range(context)])
    assert_close(A3().measure(layer).double(), expected, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**31))
def test_cacheblend_is_the_change_of_values(context: int, tail: int, seed: int):
    layer = fresh_layer(torch.Generator().manual_seed(seed), context, tail, 2, 2)
    expected = (layer.value[:context] - layer.copied).double().pow(2).flatten(1).sum(1)
    assert_close(CacheBlend().measure(layer).double(), expected, rtol=1e-4, atol=1e-6)
