"""All kernels compile for GPUs that this machine need not have, and use them as they are meant to."""

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
MULTIPLYING = ("_attend", "_join", "_rank", "_row_attention", "_correct")
NAMES = {*MULTIPLYING, "_copy_rotated", "_observe"}
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have (CUDA programming guide, compute capabilities)."""


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """Both compile at the same time."""
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
    """What each kernel needs on A100 (80) and H100 (90)."""
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
    """Matrix units, loads and stores of 16 bytes, and on an H100 no register that is kept in memory."""
    arch, needs = compiled
    for name in NAMES:
        need = needs[f"{name} {dtype}"]
        assert (need["wgmma"] > 0) == (name in MULTIPLYING and arch == 90), name
        assert (need["mma"] > 0) == (name in MULTIPLYING and arch == 80), name
        if arch == 90:
            assert need["spilled"] == 0, name
    copying = needs[f"_copy_rotated {dtype}"]
    assert copying["narrow"] == 0
    assert copying["wide"] > 0
