"""The rules that rank reused rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a3_sglang.selectors import Probe, Reuse, Selector, make_selector, selector_names

SELECTORS = [make_selector(name) for name in selector_names()]


def test_names_make_what_they_say():
    assert set(selector_names()) == {"probe", "reuse"}
    assert {type(make_selector(name)) for name in ("probe", "reuse")} == {Probe, Reuse}
    assert all(make_selector(name).name == name for name in selector_names())


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: s.name)
@given(reused=st.integers(0, 100_000), ratio=st.floats(0, 1))
def test_budget_is_the_ratio_rounded_up(selector: Selector, reused: int, ratio: float):
    budget = selector.budget(ratio, reused)
    if selector.name == "reuse":
        assert budget == 0
    else:
        assert budget - 1 < ratio * reused <= budget or budget == ratio * reused == 0
        assert budget <= reused


@given(st.integers(0, 100_000))
def test_budget_edges(reused: int):
    probe = Probe()
    assert probe.budget(0.0, reused) == 0
    assert probe.budget(1.0, reused) == reused
    assert probe.budget(1e-9, reused) == min(1, reused)


@given(st.data())
def test_pick_takes_the_highest_and_of_equals_the_earlier(data: st.DataObject):
    context = data.draw(st.integers(1, 200))
    # Few distinct values, so that ties are the rule.
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.5]), min_size=context, max_size=context))
    positions = sorted(data.draw(st.sets(st.integers(0, context - 1), min_size=1)))
    count = data.draw(st.integers(0, len(positions)))
    arguments = torch.tensor(scores), torch.tensor(positions), count
    expected = sorted(sorted(positions, key=lambda p: (-scores[p], p))[:count])
    for selector in SELECTORS:
        picked = selector.pick(*arguments)
        assert picked.dtype == torch.int64
        assert picked.tolist() == expected
        assert selector.pick(*arguments).tolist() == expected


@given(st.integers(1, 200))
def test_probe_reads_a_band_of_middle_layers(depth: int):
    layers = Probe().probe_layers(depth)
    assert 1 <= len(layers) <= math.ceil(0.3 * depth) + 1
    assert layers.start >= 0
    assert layers.stop <= depth
    assert layers.step == 1


def test_probe_band_of_known_models():
    assert Probe().probe_layers(30) == range(12, 21)
    assert Probe().probe_layers(32) == range(12, 22)
    assert Probe(first=0.0, last=1.0).probe_layers(7) == range(7)


@given(st.integers(1, 200))
def test_reuse_asks_for_no_probe(depth: int):
    assert not len(Reuse().probe_layers(depth))
