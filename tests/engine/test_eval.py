"""The command ``a3-sglang eval`` on the real engine."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import typer

from a3_sglang.cli.evaluate import evaluate
from a3_sglang.evaluation.runner import NOISE


@pytest.mark.engine
def test_eval_on_the_engine(model: str, tmp_path):
    """`full` equals the reference, the rest is further away; single results are kept, and a run resumes from them."""
    cells, out = tmp_path / "cells.jsonl", tmp_path / "out.json"
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": os.environ["A3_TEST_DTYPE"],
        "task": "facts",
        "selectors": "probe,random,reuse",
        "ratios": "0.15",
        "donors": "harvest,compiled",
        "limit": 2,
        "start": 0,
        "charged": False,
        "answers": True,
        "passages": 3,
        "passage_tokens": 150,
        "seed": 5,
        "cells": cells,
        "json": out,
        "data": None,
    }
    evaluate(**arguments)
    rows = {(row["selector"], row["donors"]): row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 10
    assert all(0 <= row["em"] <= row["f1"] <= 1 for row in rows.values())
    for donors in ("harvest", "compiled"):
        assert rows["full", donors]["kl"] == 0
        assert rows["full", donors]["agreement"] == 1
        assert rows["full", donors]["charged"] == 1
        # Nothing is recomputed, but block matching leaves out up to 30 tokens of each passage.
        assert rows["reuse", donors]["charged"] < 30 / 150
        assert rows["reuse", donors]["kl"] > max(rows[NOISE, donors]["kl"], 1e-6)
        assert rows["probe", donors]["kl"] < rows["reuse", donors]["kl"]
        assert 0.15 <= rows["probe", donors]["charged"] < 0.35
        assert rows["probe", donors]["charged"] > rows["random", donors]["charged"] >= 0.15
        assert all(row["n"] == 2 for row in rows.values())
    kept = cells.read_text().splitlines()
    assert len(kept) == 20
    cells.write_text("\n".join(kept[:-3]) + "\n")
    before = json.loads(out.read_text())
    evaluate(**arguments)
    assert json.loads(out.read_text()) == before
    for other in {"seed": 6}, {"answers": False}:
        with pytest.raises(typer.BadParameter, match="other settings"):
            evaluate(**arguments | other)
    # Two other questions at equal cost: a rule that computes some layers in full gets fewer rows.
    equal = {"selectors": "probe,cacheblend", "ratios": "0.2", "donors": "compiled", "start": 2, "charged": True}
    evaluate(**arguments | equal | {"answers": False, "cells": None})
    for row in json.loads(out.read_text())["rows"][2:]:
        assert row["f1"] is row["em"] is None
        assert row["charged"] == pytest.approx(0.2, abs=0.005)
        assert row["n"] == 2
