"""Makes the CPU environment and the test model, and says where they are.

Standard library only, so that a bare Python 3.11 with pip is enough::

    python3 tools/environment bin [--sglang VERSION]   # the folder with the environment's python
    python3 tools/environment model                    # the folder of the test model
    python3 tools/environment gemma                    # the folder of the second one, under Gemma's terms of use
    python3 tools/environment triton                   # a folder with the Triton that SGLang has on a GPU
    python3 tools/environment browser                  # the Chromium of the browser tests
    python3 tools/environment plan                     # what `make demo` will do, and how long that takes
    python3 tools/environment clean                    # removes what the others have made

All but the last two make what is missing and print one line on stdout, its path; everything else goes to stderr.
Environments and models are in ``${XDG_CACHE_HOME:-~/.cache}/a3-sglang``, outside the clone, and shared by clones with
the same locks. The browser is the system's: on Debian and Ubuntu, root installs it with apt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from common import MARKER, ROOT, ToolError, cache_folder, locked, run, say
from installs import (
    DEFAULT_SGLANG,
    LOCKS,
    MATRIX_SGLANG,
    environment_folder,
    pip_install,
    provide_environment,
    python_of,
    read_lock,
)
from models import MODEL_NAME, provide_gemma, provide_model

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


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
        print("environment: Python 3.11 or newer is needed", file=sys.stderr)
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
        print(f"environment: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("environment: interrupted; the next run makes what is missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
