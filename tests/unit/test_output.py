"""Output of commands: progress everywhere, no warnings of libraries, the dtype and its reason."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from a3_sglang.cli.output import silence, steps, working
from a3_sglang.cpu import BF16_FLAGS, choose_dtype, cpu_flags

COMMAND = [sys.executable, "-P", "-c", "from a3_sglang.cli import main; main()"]


@pytest.mark.parametrize("flag", BF16_FLAGS)
def test_bfloat16_if_the_cpu_has_instructions_for_it(flag: str) -> None:
    dtype, reason = choose_dtype(frozenset({"avx2", "avx512f", flag}), {})
    assert dtype == "bfloat16"
    assert BF16_FLAGS[flag] in reason
    for variable, value in {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}.items():
        dtype, reason = choose_dtype(frozenset({flag}), {variable: value})
        assert dtype == "float32"
        assert variable in reason
    assert choose_dtype(frozenset({flag}), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"})[0] == "bfloat16"


@pytest.mark.parametrize("flags", [frozenset(), frozenset({"avx2", "fma"}), frozenset({"avx512f", "avx512_vnni"})])
def test_float32_elsewhere(flags: frozenset[str]) -> None:
    dtype, reason = choose_dtype(flags, {})
    assert dtype == "float32"
    assert "no bfloat16" in reason


def test_flags_are_those_of_this_cpu() -> None:
    if not Path("/proc/cpuinfo").exists():
        assert cpu_flags() == frozenset()
        return
    assert cpu_flags()
    assert all(f" {flag}" in Path("/proc/cpuinfo").read_text() for flag in cpu_flags())


class Pipe(io.StringIO):
    """A file that counts flushes."""

    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


def test_a_pipe_gets_a_line_per_step_at_once() -> None:
    pipe = Pipe()
    console = Console(file=pipe, force_terminal=False)
    with working("starting", console):
        assert "starting ..." in pipe.getvalue()
        assert pipe.flushes >= 1
    with steps("asking", 3, done=1, console=console) as step:
        for number in (2, 3):
            before = pipe.flushes
            step()
            assert f"asking: {number}/3" in pipe.getvalue().splitlines()[-1]
            assert pipe.flushes > before
    assert "\x1b" not in pipe.getvalue()
    assert "starting: done in" in pipe.getvalue()


def test_many_steps_of_unknown_number_make_few_lines() -> None:
    pipe = Pipe()
    console = Console(file=pipe, force_terminal=False)
    with steps("asking", None, console=console, pause=3600) as step:
        for _ in range(100):
            step()
    assert [line.split(" (")[0] for line in pipe.getvalue().splitlines()] == ["asking ...", "asking: 1"]
    with steps("asking", 100, console=console, pause=3600) as step:
        for _ in range(100):
            step()
    assert [line.split(" (")[0] for line in pipe.getvalue().splitlines()[2:]] == [
        "asking: 100 steps",
        "asking: 1/100",
        "asking: 100/100",
    ]
    terminal = io.StringIO()
    with steps("asking", None, console=Console(file=terminal, force_terminal=True, width=100)) as step:
        step()
    assert "1/?" in terminal.getvalue()


def test_a_terminal_gets_a_bar_that_is_drawn_at_steps_only() -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100)
    with steps("asking", 2, console=console) as step:
        step()
        drawn = len(terminal.getvalue())
        assert "1/2" in terminal.getvalue()
        assert len(terminal.getvalue()) == drawn
        step()
    assert "2/2" in terminal.getvalue()


def test_variables_of_the_user_are_kept() -> None:
    environ = {"PYTHONWARNINGS": "error"}
    silence(environ)
    assert environ["PYTHONWARNINGS"] == "error"
    assert environ["TQDM_DISABLE"] == "1"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, check=False)


def test_commands_print_no_warnings_unless_asked(model: str) -> None:
    done = run("doctor", "--model", model)
    assert done.returncode == 0
    assert "supported" in done.stdout
    assert done.stderr == ""
    loud = run("doctor", "--model", model, "--verbose")
    assert loud.returncode == 0
    assert "Warning" in loud.stderr


def test_doctor_says_what_will_be_refused(model: str, tmp_path: Path) -> None:
    done = run("doctor", "--model", model, "--json", str(tmp_path / "figures.json"), "--", "--enable-lora")
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads((tmp_path / "figures.json").read_text())}
    assert [name for name, check in checks.items() if not check["ok"]] == ["server options"]
    assert "--enable-lora" in checks["server options"]["found"]
    assert "22.5 KiB per token" in checks["KV"]["found"]
    rope = {"rope_type": "dynamic", "factor": 2.0}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("doctor", "--model", str(tmp_path))
    assert done.returncode == 1
    assert "RoPE of type 'dynamic'" in done.stdout


def test_doctor_runs_without_sglang() -> None:
    """It says how to install SGLang; the other commands are not asked for it until they run."""
    code = """
        import importlib.metadata, sys

        version = importlib.metadata.version

        def hiding(name):
            if name == "sglang":
                raise importlib.metadata.PackageNotFoundError
            return version(name)

        importlib.metadata.version = hiding
        sys.modules["sglang"] = None  # Importing it is an error.
        sys.argv[1:] = ["doctor"]
        from a3_sglang.cli import main

        main()
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert 'not installed; pip install "a3-sglang[cuda]"' in done.stdout
    assert "plugin entry point" in done.stdout


def test_a_failed_start_shows_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = run("verify", "--model", str(tmp_path))
    assert done.returncode != 0
    assert "model_type" in done.stderr
