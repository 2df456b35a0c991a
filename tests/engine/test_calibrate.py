"""The command ``a3-sglang calibrate`` on the real engine, and a server that finds what it wrote."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from a3_sglang.cli.calibrate import calibrate
from a3_sglang.client import environment, flush
from a3_sglang.drift.file import DriftFile, known_file
from a3_sglang.drift.fingerprint import fingerprint
from a3_sglang.drift.fit import SpanDrift
from a3_sglang.evaluation.calibration import measure_case
from a3_sglang.evaluation.prompts import Case
from helpers.engines import Engines
from helpers.reference import Llama, backwards, rope64
from helpers.tolerance import distance
from helpers.traffic import Traffic

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def calibrated(cache: Path, tiny: str) -> DriftFile:
    """What the command wrote; then in the file, keys are never corrected and values in full."""
    json_file = cache / "figures.json"
    with environment(XDG_CACHE_HOME=str(cache)):
        calibrate(
            model=tiny,
            data=None,
            limit=2,
            output=None,
            print_only=False,
            passages=3,
            passage_tokens=200,
            seed=1,
            dtype=os.environ["A3_TEST_DTYPE"],
            verbose=False,
            json=json_file,
        )
        of = fingerprint(tiny)
        assert of is not None
        written = DriftFile.read(known_file(of))
        assert json.loads(json_file.read_text()) == json.loads(known_file(of).read_text())
        changed = {"keys": replace(written.keys, damping=0), "values": replace(written.values, damping=1)}
        written.model_copy(update=changed).write(known_file(of))
    return written


@pytest.fixture(scope="module")
def served(calibrated: DriftFile, cache: Path, tiny: str, engines: Engines) -> Traffic:
    """A server that finds the changed file by itself."""
    options = {"XDG_CACHE_HOME": str(cache), "A3_EXPLAIN": "on", "A3_DRIFT": "auto"}
    running, folder = engines.get(tiny, "a3", options)
    return Traffic(running, seed=11, folder=folder)


def test_a_model_is_calibrated(calibrated: DriftFile) -> None:
    assert calibrated.measured["count"] == 2
    # Three passages in each of two prompts. Of compiled ones, the first is a prefix; harvested ones may be one span.
    assert 2 * (2 + 1) <= calibrated.measured["spans"] <= 2 * (2 + 3)
    rows = calibrated.measured["left"]
    assert [(row["kind"], row["tested_on"]) for row in rows] == [
        (kind, half) for kind in ("keys", "values") for half in ("even", "odd")
    ]
    for row in rows:
        assert 0 < row["all"] < 1
        assert row["all"] <= row["default"] + 0.01


def test_the_server_finds_the_file_and_corrects_by_it(served: Traffic) -> None:
    served.ask(served.prompt([0, 1, 2, 3]), {"donor": True})
    prompt = served.prompt([3, 2, 1, 0])
    fused = served.kv(served.ask(prompt, {"ratio": 0.2, "keep": False}))
    out = served.ask(prompt, {"selector": "reuse", "keep": False, "explain": True})
    copied = served.kv(out)
    reused = torch.cat([torch.arange(span["start"], span["end"]) for span in out["meta_info"]["a3"]["detail"]["spans"]])
    kept = reused[~torch.isin(reused, fused["recomputed"])]
    assert 0 < len(kept) < len(reused)
    assert torch.equal(fused["k"][:, kept], copied["k"][:, kept])
    assert distance(fused["v"][1:, kept], copied["v"][1:, kept]) > 0.01


def test_measured_drift_is_that_of_float64(served: Traffic, tiny: str) -> None:
    oracle, order = Llama.load(Path(tiny)), [0, 1, 2]
    served.renew()
    donor, prompt = served.prompt(order), served.prompt(order[::-1])
    compiled = [served.system + served.documents[i] for i in order]
    case = Case(prompt, {"harvest": [donor], "compiled": compiled})
    assert served.folder is not None
    found = measure_case(served.running, served.folder, 0, case)
    assert {span.donors for span in found} == {"harvest", "compiled"}

    flush(served.running)
    served.ask(donor, {"donor": True})
    out = served.ask(prompt, {"selector": "reuse", "keep": False, "explain": True})
    spans = out["meta_info"]["a3"]["detail"]["spans"]
    harvested = [span for span in found if span.donors == "harvest"]
    back = backwards(oracle.ropes[0].cos_sin.double())
    fresh, old = (oracle.prefill64(torch.tensor(tokens))[:2] for tokens in (prompt, donor))
    for measured, span in zip(harvested, spans, strict=True):
        here, there = (
            slice(span["start"], span["end"]),
            slice(span["offset"], span["offset"] + span["end"] - span["start"]),
        )
        keys, values = [], []
        for layer in range(1, oracle.depth):
            now, before = (rope64(kv[0][layer][at], back[at], oracle.neox) for kv, at in ((fresh, here), (old, there)))
            keys.append((now - before).flatten(1))
            values.append((fresh[1][layer][here] - old[1][layer][there]).flatten(1))
        for drift, moments in ((keys, measured.keys), (values, measured.values)):
            all_layers = torch.stack(drift)
            observed = moments.observed
            expected = SpanDrift.of(all_layers, observed, all_layers[:, observed])
            assert distance(moments.drift, expected.drift) < 0.05
            # Recomputed rows show most of their drift.
            shown, true = moments.cross[observed].diagonal().sum(), expected.drift[observed, observed].sum()
            assert 0.4 * true < shown < 1.6 * true


def test_what_cannot_be_measured_is_refused(tmp_path: Path, tiny: str) -> None:
    arguments = {"limit": 2, "output": None, "print_only": False, "passages": 2, "passage_tokens": 200, "seed": 0}
    with pytest.raises(typer.BadParameter, match=r"no.json: No such file"):
        calibrate(model=tiny, data=tmp_path / "no.json", **arguments)
    with pytest.raises(typer.BadParameter, match="not on this machine"):
        calibrate(model="nobody/no-such-model", dtype="float32", **arguments)
