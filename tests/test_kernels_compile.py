"""All kernels compile for GPUs that this machine need not have, and use them as they are meant to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DTYPES = ("bfloat16", "float16")
MULTIPLYING = ("_attend", "_join", "_rank", "_row_attention", "_correct")
NAMES = {*MULTIPLYING, "_copy_rotated", "_observe"}
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have (CUDA programming guide, compute capabilities)."""


@pytest.fixture(scope="module", params=[80, 90])
def compiled(request: pytest.FixtureRequest) -> tuple[int, dict[str, dict[str, int]]]:
    """What each kernel needs on A100 (80) and H100 (90)."""
    script = Path(__file__).with_name("compile_kernels.py")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", script, str(request.param)], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


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
