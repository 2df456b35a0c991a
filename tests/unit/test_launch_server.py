"""Options that reach the server: on its command line, as arguments of an engine, and in configuration files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from a3_sglang.config import ServerOptions
from a3_sglang.launch_server import arguments


def test_given_options_take_precedence():
    line = arguments(["--model-path", "m", "--radix-cache-backend=default", "--dtype", "float16"], cuda=False)
    assert line[:5] == ["--model-path", "m", "--radix-cache-backend=default", "--dtype", "float16"]
    assert "--radix-cache-backend" not in line
    assert line.count("--dtype") == 1
    assert line[line.index("--device") + 1] == "cpu"
    on_gpu = arguments(["--model-path", "m"], cuda=True)
    assert on_gpu[2:] == ["--radix-cache-backend", "a3", "--enable-cache-report"]


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (["-m", "a3_sglang.launch_server"], "--a3-min-span", "3"),
        (["-c", "from sglang.cli.main import main; main()", "serve"], "--a3-donors", "bought"),
    ],
    ids=["a3_sglang.launch_server", "sglang serve"],
)
def test_a_bad_option_is_one_line(tiny: str, command: list[str], option: str, value: str):
    done = subprocess.run(
        [sys.executable, "-P", *command, "--model-path", tiny, option, value],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1"},
    )
    assert done.returncode == 2
    assert f"error: {option}: " in done.stderr


def test_options_of_an_engine(tiny: str, monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for name in ("A3_MIN_SPAN", "A3_DONORS"):
        monkeypatch.setenv(name, "")  # Registers the variable to be restored after the test.
        monkeypatch.delenv(name)
    create = Engine.server_args_class
    given = create(model_path=tiny, device="cpu", radix_cache_backend="a3", a3_min_span=64)
    assert given.radix_cache_backend == "a3"
    assert ServerOptions.from_environment().min_span == 64
    create(model_path=tiny, device="cpu", radix_cache_backend="a3", a3_donors="compiled")
    options = ServerOptions.from_environment()
    assert (options.min_span, options.donors) == (ServerOptions().min_span, "compiled")
    with pytest.raises(ValueError, match="--a3-min-span"):
        create(model_path=tiny, a3_min_span=3)
    with pytest.raises(TypeError, match=r"a3_ratio.*a3_recompute_ratio"):
        create(model_path=tiny, a3_ratio=0.3)
    create(model_path=tiny, device="cpu")


def test_options_in_a_configuration_file(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("A3_RECOMPUTE_RATIO", "A3_DONORS"):
        monkeypatch.setenv(name, "")  # Registers the variable to be restored after the test.
        monkeypatch.delenv(name)
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    file = tmp_path / "config.yaml"
    file.write_text("radix-cache-backend: a3\na3-recompute-ratio: 0.25\na3-donors: compiled\ndevice: cpu\n")
    given = prepare_server_args(["--model-path", tiny, "--config", str(file)])
    assert given.radix_cache_backend == "a3"
    options = ServerOptions.from_environment()
    assert (options.recompute_ratio, options.donors) == (0.25, "compiled")
