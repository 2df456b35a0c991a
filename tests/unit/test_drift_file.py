"""Files of the model of drift, and the fingerprints by which servers find them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from a3_sglang.cli.experiment import drift_of
from a3_sglang.drift.file import DriftFile, find_drift, known_file
from a3_sglang.drift.fingerprint import fingerprint
from a3_sglang.drift.model import DEFAULT, Covariance
from helpers.drift import drawn_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a model; files of drift are kept beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "4", "dtype": "float32"}))
    (folder / "model-1.safetensors").write_bytes(bytes(range(256)) * 400)
    (folder / "model-2.safetensors").write_bytes(b"few")
    return folder


def written(path: Path, model: Path, seed: int = 0, **changes: Any) -> DriftFile:
    drift = drawn_model(seed)
    of = fingerprint(str(model))
    assert of is not None
    file = DriftFile(model=str(model), fingerprint=of, keys=drift.keys, values=drift.values)
    file.write(path)
    if changes:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return file


def test_what_was_written_is_read(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "drift.json"
    file = written(path, model)
    assert DriftFile.read(path) == file
    assert DriftFile.read(path).drift == drawn_model(0)
    assert [other.name for other in path.parent.iterdir()] == ["drift.json"]


def test_auto_takes_the_file_of_this_model(model: Path) -> None:
    of = fingerprint(str(model))
    assert of is not None
    assert find_drift("auto", str(model)) == (DEFAULT, "default")
    written(known_file(of), model, seed=3)
    assert find_drift("auto", str(model)) == (drawn_model(3), str(known_file(of)))
    assert find_drift("default", str(model)) == (DEFAULT, "default")


def test_a_file_can_be_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    written(path, model, seed=4)
    assert find_drift(str(path), str(model)) == (drawn_model(4), str(path))


def test_without_the_models_files_auto_is_the_default_and_a_named_file_is_trusted(model: Path, tmp_path: Path) -> None:
    assert fingerprint("nobody/no-such-model") is None
    assert find_drift("auto", "nobody/no-such-model") == (DEFAULT, "default")
    written(tmp_path / "mine.json", model, seed=4)
    assert find_drift(str(tmp_path / "mine.json"), "nobody/no-such-model")[0] == drawn_model(4)


def test_kept_results_belong_to_one_model_of_drift(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drift_of(str(model)) == "default"
    seen = {"default"}
    for seed in (4, 5):
        written(tmp_path / "mine.json", model, seed=seed)
        monkeypatch.setenv("A3_DRIFT", str(tmp_path / "mine.json"))
        assert drift_of(str(model)) not in seen
        seen.add(drift_of(str(model)))
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(typer.BadParameter, match=r"mine\.json"):
        drift_of(str(model))


COVARIANCE = dict(vars(DEFAULT.keys))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": 2}, "format: only 1"),
        ({"layers": []}, "layers: Extra inputs"),
        ({"keys": COVARIANCE | {"damping": 1.5}}, "keys: damping must be from 0 to 1, not 1.5"),
        ({"keys": COVARIANCE | {"damping": float("nan")}}, "keys: damping must be"),
        ({"values": COVARIANCE | {"shared_range": 0}}, "values: shared_range must be positive"),
        ({"values": COVARIANCE | {"shared_range": float("inf")}}, "values: shared_range must be positive and finite"),
        ({"values": COVARIANCE | {"local_sill": 0.7}}, "values: shared_sill \\+ local_sill must be at most 0.99"),
        ({"values": COVARIANCE | {"variance_decay": -0.1}}, "values: variance_decay must be finite and not negative"),
        ({"values": COVARIANCE | {"min_local_variance": 0}}, "values: min_local_variance must be above 0"),
        ({"values": COVARIANCE | {"wind": 1}}, "values.wind: "),
        ({"values": {"damping": 1}}, "values.shared_sill: Field required"),
        ({"keys": "long"}, "keys: Input should be"),
    ],
)
def test_a_bad_file_is_refused_by_field_with_what_to_do(
    model: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    path = tmp_path / "bad.json"
    written(path, model, **changes)
    with pytest.raises(ValueError, match=f"bad.json: {named}.*; run a3-sglang calibrate again") as refusal:
        find_drift(str(path), str(model))
    assert "\n" not in str(refusal.value)


def test_files_that_are_none_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no.json: No such file or directory; a3-sglang calibrate -o"):
        find_drift(str(tmp_path / "no.json"), str(model))
    (tmp_path / "text.json").write_text("drift")
    with pytest.raises(ValueError, match=r"text.json: the file: Invalid JSON.*; run a3-sglang calibrate again"):
        find_drift(str(tmp_path / "text.json"), str(model))


def test_a_file_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    (other / "model-2.safetensors").write_bytes(b"new")
    written(tmp_path / "other.json", other)
    with pytest.raises(ValueError, match=f"fingerprint: it was fitted to another model .*calibrate --model {model}"):
        find_drift(str(tmp_path / "other.json"), str(model))


def test_a_copy_in_another_folder_has_the_same_fingerprint(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    described = {"dtype": "bfloat16", "transformers_version": "5", "_name_or_path": "x", "hidden_size": 8}
    (copy / "config.json").write_text(json.dumps(described, indent=2))
    # Another form of the same weights, and what else may be in a model's folder.
    (copy / "pytorch_model.bin").write_bytes(b"copy")
    (copy / "README.md").write_text("about")
    assert fingerprint(str(copy)) == fingerprint(str(model))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"hidden_size": 9}'),
        ("model-1.safetensors", bytes(range(256)) * 399 + bytes(256)),
        ("model-1.safetensors", bytes(range(256)) * 401),
        ("model-3.safetensors", b"more"),
    ],
)
def test_other_configurations_and_weights_have_other_fingerprints(model: Path, name: str, content: bytes) -> None:
    before = fingerprint(str(model))
    (model / name).write_bytes(content)
    assert fingerprint(str(model)) != before


def test_a_single_file_is_a_model_as_well(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    assert fingerprint(str(file)) != fingerprint(str(model))
    assert find_drift("auto", str(file)) == (DEFAULT, "default")


def test_a_covariance_checks_itself() -> None:
    with pytest.raises(ValueError, match="local_range"):
        Covariance(**COVARIANCE | {"local_range": -1})
