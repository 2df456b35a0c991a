"""Shared pieces of the engine tests: one real engine at a time, real weights, real tokens."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

KERNELS = ("copy", "question", "row_attention", "spread")
"""Modules that have Triton kernels."""

# Where there is no GPU, kernels run in Triton's interpreter. It is chosen when Triton is first imported, which is
# here, and not in the processes of the engines.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
for module in ("triton.experimental.gluon.language", *(f"a3_sglang.kernels.{name}" for name in KERNELS)):
    importlib.import_module(module)
os.environ.pop("TRITON_INTERPRET", None)

from traffic import MIN_REUSE, Traffic

from a3_sglang.cli.common import engine, environment

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

# How long an example takes says nothing about what it shows.
settings.register_profile("a3", deadline=None)
settings.load_profile("a3")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "gpu" in r.keywords]
    terminalreporter.write_line(f"GPU tests skipped: {len(skipped)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def model() -> str:
    folder = os.environ.get("A3_TEST_MODEL")
    if not folder:
        pytest.fail("A3_TEST_MODEL names no model folder: run `make test`")
    return folder


@pytest.fixture(scope="module")
def traffic(model: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Traffic]:
    """An engine with the backend a3; a module's ``ENGINE`` dict overrides its arguments, ``OPTIONS`` its options."""
    folder = tmp_path_factory.mktemp("kv")
    arguments = {"chunked_prefill_size": 2048, "max_total_tokens": 16384} | getattr(request.module, "ENGINE", {})
    with (
        environment(A3_DUMP_KV=str(folder), A3_MIN_REUSE=MIN_REUSE, **getattr(request.module, "OPTIONS", {})),
        engine(model, "a3", **arguments) as running,
    ):
        yield Traffic(running, seed=random.randrange(1 << 30), folder=folder)
