"""The command ``a3-sglang bench equal`` on the real engine."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from a3_sglang.cli.equal import equal
from a3_sglang.evaluation.equal import DEFAULT, PEERS, RATIO


@pytest.mark.engine
def test_equal_on_the_engine(model: str, tmp_path):
    """The default is compared at a ratio at which it was measured to be as close to the full prefill as the others."""
    out, cells, picture = tmp_path / "out.json", tmp_path / "cells.jsonl", tmp_path / "equal.svg"
    arguments: dict[str, Any] = {
        "model": model,
        "data": None,
        "task": "facts",
        "limit": 2,
        "start": 0,
        "context": 1536,
        "chunks": 6,
        "donors": "harvest",
        "grid": "0.02",
        "repeats": 1,
        "seed": 4,
        "cells": cells,
        "dtype": os.environ["A3_TEST_DTYPE"],
        "json": out,
        "svg": picture,
    }
    equal(**arguments)
    figures = json.loads(out.read_text())
    curve = {row["ratio"]: row for row in figures["curve"]}
    assert {0.02, 0.15} <= curve.keys()
    assert [(row["rule"], row["ratio"]) for row in figures["rows"]] == [(peer, RATIO) for peer in PEERS]
    default = figures["default"]
    assert (default["rule"], default["ratio"], default["kl"]) == (DEFAULT, RATIO, curve[RATIO]["kl"])
    charged = {row["rule"]: row["charged"] for row in figures["rows"]}
    # Two of 30 layers in full, 48 to 64 rows through all layers or through 18 of them, nothing but the rows.
    assert charged["a3"] == charged["cacheblend"] > charged["prophetkv"] > charged["qcfuse"] > charged["epic"] >= RATIO
    for row in figures["rows"]:
        at = row["default"]
        assert row["kl"] > 0
        if at is None:
            assert min(point["kl"] for point in curve.values()) > row["kl"]
            continue
        assert at["rule"] == DEFAULT
        assert at["kl"] <= row["kl"]
        assert (at["kl"], at["charged"]) == (curve[at["ratio"]]["kl"], curve[at["ratio"]]["charged"])
        assert at["speedup"] == pytest.approx(figures["stock_ms"] / at["ms"], abs=1e-3)
        assert len(at["repeats_ms"]) == len(row["repeats_ms"]) == 1
    assert picture.read_text().startswith("<?xml")
    kept = cells.read_text()
    assert len(kept.splitlines()) == 2 * (len(PEERS) + len(curve))
    equal(**arguments)
    assert cells.read_text() == kept
    again = json.loads(out.read_text())
    assert [row["kl"] for row in again["rows"]] == [row["kl"] for row in figures["rows"]]
