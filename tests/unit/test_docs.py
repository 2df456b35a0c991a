"""The site of docs/ builds without a warning and loads nothing from other hosts; its commands are accepted."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from a3_sglang.config import ServerOptions, env_name
from a3_sglang.launch_server import arguments
from helpers.steps import python_blocks, steps

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


class Loaded(HTMLParser):
    """Collects the addresses that a browser loads for a page: scripts, styles, images, fonts, frames; no links."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        loading = {"src", "srcset", "poster", "data"} | ({"href"} if tag not in ("a", "area") else set())
        self.addresses += [value for name, value in attrs if value and name in loading]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in PAGES:
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.addresses
        for address in loaded.addresses:
            assert not urlsplit(address).netloc, (page.name, address)
    styles = sorted(site.rglob("*.css"))
    assert styles
    for style in styles:
        text = style.read_text(encoding="utf-8")
        for address in re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text):
            assert address.startswith("data:") or not urlsplit(address).netloc, (style.name, address)


def test_recipes_include_the_programs_as_they_are(site: Path) -> None:
    """Every example is included in some page; every Python block is included from a file or followed by a test."""
    shown = {name for page in PAGES for name in re.findall(r'--8<-- "examples/([^"]+)"', page.read_text())}
    demo = {"demo.py"}  # `make demo`
    assert shown == {file.name for file in (ROOT / "examples").glob("*.*") if file.suffix in (".py", ".yaml")} - demo
    followed = {block for step in steps("Add a selector") for block in python_blocks(step)}  # test_extending.py
    for page in PAGES:
        for block in python_blocks(page.read_text()):
            assert block.startswith("--8<--") or block in followed, (page.name, block)


def launches() -> list[str]:
    """Commands in the docs that start a server."""
    texts = [page.read_text() for page in (ROOT / "README.md", *PAGES, ROOT / "examples" / "config.yaml")]
    pattern = r"(?:python -m (?:a3_sglang|sglang)\.launch_server|sglang serve)(?: [^\n`]+)"
    return sorted({found.strip() for text in texts for found in re.findall(pattern, text)})


@pytest.mark.parametrize("command", launches())
def test_commands_that_start_a_server_are_accepted(
    command: str, tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ServerOptions.model_fields:
        monkeypatch.setenv(env_name(name), "")  # Registers the variable to be restored after the test.
        monkeypatch.delenv(env_name(name))
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    monkeypatch.chdir(ROOT)
    head, *given = shlex.split(re.sub("MODEL|<model>", tiny, command))
    if head == "sglang":
        given = ["--model-path", *given[1:]]
    else:
        given = arguments(given[2:], cuda=False) if given[1].startswith("a3_") else given[2:]
    parsed = prepare_server_args(given if "--device" in given else [*given, "--device", "cpu"])
    assert parsed.radix_cache_backend == "a3"
    ServerOptions.from_environment()
