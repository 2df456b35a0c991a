"""Makes virtual environments from the project's locks, and installs the clone in them. Standard library only."""

from __future__ import annotations

import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common import MARKER, ROOT, SCRAPS, ToolError, cache_folder, hash_of, locked, run, say, source_files

LOCKS = ROOT / "locks"
SUPPORT = ROOT / "support"

DEFAULT_SGLANG = "0.5.23"
MATRIX_SGLANG = ("0.5.17", "0.5.21")

# Increase this when environments are built differently, so that old ones are not reused.
RECIPE = "1"
# Holds the hash of the project's sources that are installed in an environment.
STAMP = ".project"
# The sources that are installed, and the other files that the build reads.
PROJECT_SOURCES = ("pyproject.toml", "a3_sglang", "kernels")
PROJECT_TEXTS = ("README.md", "LICENSE")
SUPPORT_SOURCES = ("pyproject.toml", "a3_cpu_support")


def pip_install(python: Path, *arguments: str | Path) -> list[str | Path]:
    return [python, "-m", "pip", "install", "-qq", "--progress-bar", "off", "--no-deps", *arguments]


def read_lock(path: Path) -> dict[str, str]:
    """Return the lines of a lock by normalised package name."""
    lines: dict[str, str] = {}
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        name, equals, version = line.partition("==")
        if not equals or not name or not version:
            raise ToolError(f"{path.name}, line {number}: not of the form name==version: {line}")
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in lines:
            raise ToolError(f"{path.name}, line {number}: {name} is there twice")
        lines[key] = line
    return lines


def lock_for(sglang: str) -> list[str]:
    lines = read_lock(LOCKS / "cpu.txt")
    if sglang != DEFAULT_SGLANG:
        lines.update(read_lock(LOCKS / f"matrix-{sglang}.txt"))
    if lines.get("sglang") != f"sglang=={sglang}":
        raise ToolError(f"the locks for SGLang {sglang} name {lines.get('sglang')}")
    return [lines[key] for key in sorted(lines)]


def environment_folder(sglang: str) -> Path:
    machine = f"{platform.python_implementation()} {platform.python_version()} {sysconfig.get_platform()}"
    texts = [RECIPE, machine, "\n".join(lock_for(sglang))]
    key = hash_of(texts, SUPPORT, source_files(SUPPORT, SUPPORT_SOURCES))[:12]
    return cache_folder() / f"env-{key}"


def site_packages(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def install_copy(environment: Path, root: Path, names: Iterable[str], what: str) -> None:
    """Install a project from a temporary copy: building in place would leave build folders in the clone."""
    with tempfile.TemporaryDirectory(prefix="a3-sglang-") as temporary:
        copy = Path(temporary) / "source"
        copy.mkdir()
        for name in names:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns(*SCRAPS))
            elif (root / name).exists():
                shutil.copy2(root / name, copy / name)
        command = pip_install(python_of(environment), "--no-build-isolation", "--force-reinstall", copy)
        run(command, f"installing {what}")


def make_environment(sglang: str, environment: Path) -> None:
    """Build ``environment`` in its final location, because the scripts of a virtual environment contain its path."""
    if environment.exists():
        say(f"removing an environment that was not finished: {environment}")
        shutil.rmtree(environment)
    say(f"making the environment for SGLang {sglang} in {environment}")
    run([sys.executable, "-m", "venv", environment], "making the virtual environment (is the venv module installed?)")
    lock = lock_for(sglang)
    lock_file = environment / "lock.txt"
    lock_file.write_text("\n".join(lock) + "\n", encoding="utf-8")
    say(f"installing {len(lock)} packages (about 1 GB to fetch, 3 GB on disk; takes minutes)")

    def progress() -> str:
        installed = len(list(site_packages(environment).glob("*.dist-info")))
        return f"still at it: {installed} of {len(lock)} packages installed (all are fetched first)"

    run(pip_install(python_of(environment), "-r", lock_file), "installing the locked packages", progress)
    say("installing the stand-ins of support/")
    install_copy(environment, SUPPORT, SUPPORT_SOURCES, "support/")
    (site_packages(environment) / "a3_cpu_support.pth").write_text("import a3_cpu_support\n", encoding="utf-8")
    say("trying whether torch and torchvision can be imported")
    run(
        [python_of(environment), "-P", "-c", "import torch, torchvision"],
        "importing torch (pip may have taken a CUDA build: offer it PyTorch's CPU wheels, for example with "
        "PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS); it",
    )
    (environment / MARKER).write_text(f"sglang {sglang}\n", encoding="utf-8")
    say("the environment is complete")


def install_project(environment: Path) -> None:
    """Install this clone in ``environment``, unless the same sources are there (perhaps from another clone)."""
    wanted = hash_of([], ROOT, source_files(ROOT, PROJECT_SOURCES))
    stamp = environment / STAMP
    if stamp.exists() and stamp.read_text(encoding="utf-8").strip() == wanted:
        return
    say("installing a3-sglang from this clone")
    # No stamp while the install runs, so an interrupted install is repeated.
    stamp.unlink(missing_ok=True)
    install_copy(environment, ROOT, PROJECT_SOURCES + PROJECT_TEXTS, "a3-sglang")
    stamp.write_text(wanted + "\n", encoding="utf-8")


def provide_environment(sglang: str, *, with_project: bool) -> Path:
    environment = environment_folder(sglang)
    with locked(environment.with_suffix(".lock"), "this environment"):
        if not (environment / MARKER).exists():
            make_environment(sglang, environment)
        if with_project:
            install_project(environment)
    return environment
