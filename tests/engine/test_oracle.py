"""The engine's fused KV against a float64 Llama of the tests with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.oracle import CORRECTED, check, probe_agreement
from helpers.reference import Llama
from helpers.traffic import Traffic

pytestmark = [pytest.mark.engine, pytest.mark.core]


@pytest.fixture(scope="module")
def oracle(tiny: str) -> Llama:
    return Llama.load(Path(tiny))


@pytest.mark.parametrize("option", [{"ratio": 1.0}, CORRECTED, {"selector": "reuse"}, {"selector": "epic"}])
def test_fused_kv_is_the_oracles(traffic: Traffic, oracle: Llama, option: dict):
    check(traffic, oracle, option)


def test_the_probe_picks_the_oracles_rows(traffic: Traffic, oracle: Llama):
    # Rows near the threshold swap by rounding, on a random model more than on a trained one.
    assert probe_agreement(traffic, oracle) > 0.8
