"""The ratios at which the default rule is as close to the full prefill as published rules, and their picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from a3_sglang.cli.equal import equal
from a3_sglang.evaluation.equal import DEFAULT, DIGITS, PEERS, ROUNDS, crossing, draw, ratios_for

UNIT = 10**-DIGITS


@given(st.floats(1e-4, 1), st.floats(-3, -0.2), st.lists(st.integers(1, 9999), min_size=2, max_size=6, unique=True))
def test_a_power_law_is_crossed_where_it_is(scale: float, slope: float, ratios: list[int]):
    """KL = scale * ratio ** slope is a straight line if both axes are logarithmic, so interpolation is exact."""
    curve = {ratio / 10**DIGITS: scale * (ratio / 10**DIGITS) ** slope for ratio in ratios}
    least, most = min(curve), max(curve)
    for share in (0.1, 0.5, 0.9):
        exact = least ** (1 - share) * most**share
        found = crossing(scale * exact**slope, curve)
        assert found is not None
        assert exact - 1e-9 <= found <= exact + 1.001 * UNIT
    assert crossing(curve[least] * 1.01, curve) == least
    assert crossing(curve[most] * 0.99, curve) is None
    assert crossing(0.0, curve | {most: 0.0}) == most


class Noisy:
    """A falling curve with ups and downs, measured where it is asked for."""

    def __init__(self, amplitude: float, phase: float) -> None:
        self.amplitude, self.phase = amplitude, phase
        self.asked: list[list[float]] = []

    def kl(self, ratio: float) -> float:
        return 0.003 / (ratio + 0.02) * (1 + self.amplitude * math.sin(self.phase + 900 * ratio))

    def measure(self, ratios: list[float]) -> Mapping[float, float]:
        self.asked.append(ratios)
        return {ratio: self.kl(ratio) for ratio in ratios}


@given(st.floats(0, 0.4), st.floats(0, 7), st.dictionaries(st.sampled_from(PEERS), st.floats(0.001, 0.3), min_size=1))
def test_a_ratio_counts_only_if_its_kl_was_measured_to_be_low_enough(
    amplitude: float, phase: float, targets: dict[str, float]
):
    noisy, grid = Noisy(amplitude, phase), [0.005, 0.02, 0.05, 0.15]
    curve = dict(noisy.measure(grid))
    noisy.asked.clear()
    found = ratios_for(targets, curve, noisy.measure)
    assert found.keys() == targets.keys()
    assert len(noisy.asked) <= ROUNDS
    asked = [ratio for ratios in noisy.asked for ratio in ratios]
    assert len(set(asked)) == len(asked)
    assert curve.keys() == {*grid, *asked}
    for name, kl in targets.items():
        ratio = found[name]
        if ratio is None:
            assert min(noisy.kl(at) for at in grid) > kl
        else:
            assert ratio in curve
            assert noisy.kl(ratio) <= kl
            # No measured ratio that is good enough is much smaller.
            assert ratio <= next(at for at in grid if noisy.kl(at) <= kl) + UNIT


def test_the_picture_names_every_rule_and_repeats(tmp_path: Path):
    rows = [
        {
            "rule": peer,
            "ratio": 0.15,
            "kl": 0.01 * (i + 1),
            "ms": 100.0 + i,
            "default": {"rule": DEFAULT, "ratio": 0.01 + i / 100, "kl": 0.01 * (i + 1), "ms": 30.0} if i else None,
        }
        for i, peer in enumerate(PEERS)
    ]
    default = {"rule": DEFAULT, "ratio": 0.15, "kl": 0.001, "ms": 105.0}
    pictures = []
    for name in ("a.svg", "b.svg"):
        draw(rows, default, 300.0, "a title", tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith("<?xml")
    for text in (*PEERS, DEFAULT, "a title", "2.0%", "5.0%", "15.0%"):
        assert f"<!-- {text}" in pictures[0], text


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"donors": "sown"}, "--donors"),
        ({"grid": "0.1,x"}, "--grid"),
        ({"grid": "0,0.1"}, "--grid"),
        ({"grid": "0.1,1.5"}, "--grid"),
        ({"grid": "0.1,nan,0.2"}, "--grid"),
        ({"context": 512, "chunks": 9}, "--chunks"),
    ],
)
def test_bad_options_are_named(options: dict, hint: str):
    given_options = {"donors": "harvest", "grid": "0.1", "context": 512, "chunks": 2, "svg": None} | options
    with pytest.raises(typer.BadParameter) as error:
        equal("none", **given_options)
    assert error.value.param_hint == hint
