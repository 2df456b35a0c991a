"""All kernels compile for an A100 and an H100, which this machine need not have, and use their hardware."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DTYPES = ("bfloat16", "float16")
GATHERING = (
    "_row_attention_kernel",
    "_row_attention_kernel windowed",
    "_probe_split_kernel",
    "_probe_split_kernel windowed",
)
"""Loops over context whose slots are looked up first."""
MULTIPLYING = (
    *GATHERING,
    "_row_attention_kernel started",
    "_probe_merge_kernel",
    "_probe_merge_kernel windowed",
    "_probe_relevance_kernel",
    "_probe_relevance_kernel windowed",
    "_correct_drift_kernel",
)
NAMES = {
    *MULTIPLYING,
    "_copy_rotated_kernel",
    "_observe_drift_kernel",
    "_candidates_kernel",
    "_condition_kernel",
    "_condition_kernel first",
    "_pick_kernel",
    "_invert_kernel",
    "_weights_kernel",
}
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Upper bound of the shared memory of a program, bytes (CUDA programming guide, compute capabilities)."""
TRITON = {"installed": None, "of CUDA": os.environ.get("A3_TEST_TRITON")}
"""Folders of the Triton to compile with; the second is the one that comes with SGLang on a GPU."""

Compiler = tuple[int, str]


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[Compiler, subprocess.Popen[str]]]:
    """Processes that compile for each GPU with each Triton, all at the same time."""
    script = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
    variables = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {}
    for name, folder in TRITON.items():
        path = {"PYTHONPATH": folder} if folder else {}
        if folder or name == "installed":
            for arch in SHARED:
                command = [sys.executable, "-P", script, str(arch)]
                started[arch, name] = subprocess.Popen(command, env=variables | path, **pipes)
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module", params=[(arch, name) for name in TRITON for arch in SHARED], ids=str)
def compiled(
    request: pytest.FixtureRequest, compilers: dict[Compiler, subprocess.Popen[str]]
) -> tuple[int, dict[str, dict[str, int]]]:
    """Resources and instructions of each kernel on an A100 (80) and an H100 (90)."""
    if request.param not in compilers:
        pytest.skip("A3_TEST_TRITON does not name a folder")
    process = compilers[request.param]
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    return request.param[0], json.loads(shown)["kernels"]


def test_all_kernels_compile_and_fit(compiled):
    arch, needs = compiled
    largest = {f"{name} of 256 bfloat16" for name in NAMES}
    assert needs.keys() == {f"{name} {dtype}" for name in NAMES for dtype in DTYPES} | largest
    assert all(0 < need["registers"] <= 255 and need["shared"] <= SHARED[arch] for need in needs.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_use_the_hardware(compiled, dtype):
    """Matrix units, loads and stores of 16 bytes, and on an H100 no spilled registers."""
    arch, needs = compiled
    for name in NAMES:
        need = needs[f"{name} {dtype}"]
        # An H100's own matrix instruction takes 64 rows at least.
        has_own = arch == 90 and not name.startswith("_probe_merge_kernel")
        assert (need["wgmma"] > 0) == (name in MULTIPLYING and has_own), name
        assert (need["mma"] > 0) == (name in MULTIPLYING and not has_own), name
        if arch == 90:
            assert need["spilled"] == 0, name
    copying = needs[f"_copy_rotated_kernel {dtype}"]
    assert copying["narrow"] == 0
    assert copying["wide"] > 0
    correcting = needs[f"_correct_drift_kernel {dtype}"]
    assert correcting["async_narrow"] == 0
    assert correcting["async_wide"] > 0


@pytest.mark.parametrize("dtype", [*DTYPES, "of 256 bfloat16"])
@pytest.mark.parametrize("name", GATHERING)
def test_keys_and_values_are_asked_for_before_they_are_needed(compiled, name, dtype):
    """The loop waits for the block that it multiplies next, not for those that it has just asked for."""
    assert compiled[1][f"{name} {dtype}"]["on_their_way"] > 0
