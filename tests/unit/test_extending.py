"""docs/extending.md, followed step by step on a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import a3_sglang
from helpers.steps import code, path, steps

TESTS = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The installed package and the tests, as in a clone."""
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(a3_sglang.__file__).parent, tmp_path / "a3_sglang", ignore=hidden)
    for name in ("helpers", "fusion", "unit"):
        shutil.copytree(TESTS / name, tmp_path / "tests" / name, ignore=hidden)
    return tmp_path


def create(copy: Path, step: str) -> None:
    """The file of a step that says to create one."""
    target = copy / path(step)
    assert "Create" in step
    assert not target.exists()
    target.write_text(code(step))


def run_tests(copy: Path, *arguments: str) -> str:
    """What pytest prints, with the copy in place of the installed package."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (copy, copy / "tests")))}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--import-mode=append", "--rootdir", str(copy), *arguments]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_selector_is_one_file_and_one_line(copy: Path) -> None:
    """Added by the steps of the page, it passes the page's test and those that hold for every selector."""
    selector, registration, test, _ = steps("Add a selector")
    create(copy, selector)
    registry = copy / path(registration)
    before, entries, after = registry.read_text().partition("_SELECTORS = {\n")
    known, closing, rest = after.partition("}\n")
    line = f"    {code(registration)}"
    assert line.count("\n") == 1
    registry.write_text(before + entries + known + line + closing + rest)
    create(copy, test)
    assert "1 passed" in run_tests(copy, path(test))
    assert "2 passed" in run_tests(copy, "tests/unit/test_selectors.py", "-k", "late")
