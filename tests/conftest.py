"""What all tests share: dtype, models, the engine, the server and the browser, their order, the summary."""

from __future__ import annotations

import importlib
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from helpers.kernels import KERNELS

# TorchInductor's on-disk cache ignores ATEN_CPU_CAPABILITY: code compiled for AVX-512 and loaded by a process that
# runs with AVX2, or the reverse, corrupts that process's memory. So each capability gets a cache directory.
INDUCTOR = Path(tempfile.gettempdir()) / f"torchinductor-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(INDUCTOR))

# Without a GPU, kernels run in Triton's interpreter. It is chosen when Triton is first imported: here, but not in the
# processes of the engines.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
for module in ("triton.experimental.gluon.language", *(f"a3_sglang.kernels.{name}" for name in KERNELS)):
    importlib.import_module(module)
os.environ.pop("TRITON_INTERPRET", None)

from a3_sglang.cpu import serving_dtype

DTYPE_GIVEN = os.environ.get("A3_TEST_DTYPE")
DTYPE, WHY = (DTYPE_GIVEN, "A3_TEST_DTYPE") if DTYPE_GIVEN else serving_dtype()
os.environ["A3_TEST_DTYPE"] = DTYPE

from helpers import forking
from helpers.engines import ENGINES, STARTS, Engines, prepare
from helpers.server_traffic import ServerTraffic
from helpers.serving import SERVERS, Served
from helpers.tiny import save_random_model, tiny_llama
from helpers.traffic import Traffic

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

# The time that an example takes is no failure.
settings.register_profile("a3", deadline=None)
settings.load_profile("a3")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "gpu" in r.keywords]
    terminalreporter.write_line(f"engines and servers started: {STARTS.count}, in {STARTS.seconds:.0f} s")
    terminalreporter.write_line(f"dtype of the engines: {DTYPE} ({WHY})")
    terminalreporter.write_line(f"GPU tests skipped: {len(skipped)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without an engine come first, then those that share an engine or a server, grouped by its settings."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    kinds: dict[str, int] = {}

    def place(item: pytest.Item) -> tuple[int, int]:
        if "engine" not in item.keywords:
            return 0, 0
        if shares(item, "engines"):
            return 1, kinds.setdefault(repr(wanted(item)), len(kinds))
        if shares(item, "shared_server"):
            return 2, kinds.setdefault(repr(server_wanted(item)), len(kinds))
        return 3, 0

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    """The fork server imports SGLang while the first tests run."""
    # What CUDA has begun cannot be forked.
    wanted = any("engine" in item.keywords for item in session.items) and not session.config.option.collectonly
    if wanted and not torch.cuda.is_available():
        forking.install()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Stop the shared engine and server before tests that do not share them: only one of them runs at a time.

    Some of these tests start their own, and none of them should see the engine's variables.
    """
    if not shares(item, "engines"):
        ENGINES.stop()
    if not shares(item, "shared_server"):
        SERVERS.stop()
    if "engine" in item.keywords:
        prepare()


def pytest_sessionfinish() -> None:
    ENGINES.stop()
    SERVERS.stop()


def shares(item: pytest.Item, fixture: str) -> bool:
    return fixture in getattr(item, "fixturenames", ())


def wanted(item: Any) -> dict[str, Any]:
    """Settings of the shared engine that a module's constants ask for."""
    return {name: getattr(item.module, name, default) for name, default in SAID.items()}


SAID: dict[str, Any] = {"MODEL": "tiny", "ENGINE": {}, "OPTIONS": {}}
"""``MODEL``: "tiny" or "model", the name of the fixture; ``ENGINE``: its arguments; ``OPTIONS``: its variables."""


def server_wanted(item: Any) -> dict[str, Any]:
    """Settings of the shared server that a module's ``SERVER`` asks for: arguments of ``Servers.get``."""
    return getattr(item.module, "SERVER", {})


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


@pytest.fixture(scope="session")
def model() -> str:
    """Folder of SmolLM2-135M: for what needs language, and for real weights."""
    folder = os.environ.get("A3_TEST_MODEL")
    if not folder:
        pytest.fail("A3_TEST_MODEL names no model folder: run `make test`")
    return folder


@pytest.fixture(scope="session")
def gemma() -> str:
    """Folder of Gemma-3-270M: real weights with sliding windows, two RoPE tables, heads of 256; no chat template."""
    folder = os.environ.get("A3_TEST_GEMMA")
    if not folder:
        pytest.fail("A3_TEST_GEMMA names no model folder: run `make test`")
    return folder


@pytest.fixture(scope="session")
def tiny(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small random Llama with the tokenizer of SmolLM2."""
    return str(save_random_model(tmp_path_factory.mktemp("models") / "tiny", tiny_llama(), Path(model)))


@pytest.fixture(scope="session")
def engines() -> Engines:
    """The engine that tests share; a test uses it through a module-scoped fixture."""
    return ENGINES


@pytest.fixture(scope="module")
def shared_server(model: str, request: pytest.FixtureRequest) -> Iterator[Served]:
    """The server that tests share, see :func:`server_wanted`. Nothing may be in use at the end of a module."""
    served = SERVERS.get(model, **server_wanted(request))
    yield served
    served.flush()


@pytest.fixture(scope="module")
def server(shared_server: Served, model: str) -> ServerTraffic:
    """Prompts and requests of a module to its shared server."""
    return ServerTraffic(shared_server, model)


@pytest.fixture
def donors(server: ServerTraffic) -> None:
    """The test starts with the six documents of ``server`` in the cache and nothing else."""
    server.send_donors()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    path = os.environ.get("A3_TEST_BROWSER")
    if not path:
        pytest.fail("A3_TEST_BROWSER names no browser: run `make test`")
    # Imported here: the environments of older releases of SGLang have no Playwright.
    from playwright.sync_api import sync_playwright

    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    switches += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=switches)
        yield running
        running.close()


@pytest.fixture(scope="module")
def traffic(engines: Engines, request: pytest.FixtureRequest) -> Traffic:
    """Requests to a shared engine with the backend a3, see :data:`SAID`."""
    said = wanted(request)
    running, folder = engines.get(
        request.getfixturevalue(said["MODEL"]), "a3", options=said["OPTIONS"], **said["ENGINE"]
    )
    return Traffic(running, seed=random.randrange(1 << 30), folder=folder)
