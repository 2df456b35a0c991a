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
MULTIPLYING = (
    "_probe_split_kernel",
    "_probe_merge_kernel",
    "_probe_relevance_kernel",
    "_row_attention_kernel",
    "_correct_drift_kernel",
)
NAMES = {*MULTIPLYING, "_copy_rotated_kernel", "_observe_drift_kernel"}
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Upper bound of the shared memory of a program, bytes (CUDA programming guide, compute capabilities)."""


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """Processes that compile for each GPU, both at the same time."""
    script = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        arch: subprocess.Popen([sys.executable, "-P", script, str(arch)], env=variables, **pipes) for arch in SHARED
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module", params=SHARED)
def compiled(
    request: pytest.FixtureRequest, compilers: dict[int, subprocess.Popen[str]]
) -> tuple[int, dict[str, dict[str, int]]]:
    """Resources and instructions of each kernel on an A100 (80) and an H100 (90)."""
    process = compilers[request.param]
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    return request.param, json.loads(shown)


def test_all_kernels_compile_and_fit(compiled):
    arch, needs = compiled
    assert needs.keys() == {f"{name} {dtype}" for name in NAMES for dtype in DTYPES}
    assert all(0 < need["registers"] <= 255 and need["shared"] <= SHARED[arch] for need in needs.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_use_the_hardware(compiled, dtype):
    """Matrix units, loads and stores of 16 bytes, and on an H100 no spilled registers."""
    arch, needs = compiled
    for name in NAMES:
        need = needs[f"{name} {dtype}"]
        assert (need["wgmma"] > 0) == (name in MULTIPLYING and arch == 90), name
        assert (need["mma"] > 0) == (name in MULTIPLYING and arch == 80), name
        if arch == 90:
            assert need["spilled"] == 0, name
    copying = needs[f"_copy_rotated_kernel {dtype}"]
    assert copying["narrow"] == 0
    assert copying["wide"] > 0
