"""Processes that are forked from the server behave like spawned ones: environment, exit code, signals, end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tests fork on Linux only")

HEAD = f"""
import multiprocessing, os, signal, sys, time
sys.path.append({str(Path(__file__).parents[1])!r})
from helpers import forking

def start(target):
    process = multiprocessing.Process(target=target)
    process.start()
    return process
"""


def run(tmp_path: Path, code: str, modules: str = "('colorsys',)") -> subprocess.CompletedProcess[str]:
    """Run ``code``, which has a ``main``, as a script with the start method "spawn" as SGLang sets it."""
    start = f"""
if __name__ == "__main__":
    forking.install({modules})
    multiprocessing.set_start_method("spawn", force=True)
    main()
"""
    script = tmp_path / "script.py"
    script.write_text(HEAD + code + start)
    return subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, timeout=120, check=False)


def test_a_child_has_the_current_environment_and_the_imported_modules(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
def child():
    print(os.environ.get("A3_NEW"), os.environ.get("A3_OLD"), os.environ.get("PYTHONPATH"), "colorsys" in sys.modules)
    sys.exit(7)

def main():
    os.environ["A3_NEW"] = "there"
    process = start(child)
    process.join()
    print(process.exitcode)
""",
    )
    assert done.stdout.split() == ["there", "None", "None", "True", "7"], done.stderr


def test_a_variable_that_imports_may_read_restarts_the_server(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
def child():
    print(os.getppid())

def main():
    for name in ("A3_ONE", "OMP_ONE", "A3_TWO"):
        os.environ[name] = "1"
        start(child).join()
""",
    )
    first, second, third = done.stdout.split()
    assert first != second == third


def test_a_failed_import_is_an_error(tmp_path: Path) -> None:
    code = """
def child():
    print("runs")

def main():
    process = start(child)
    process.join()
    sys.exit(process.exitcode)
"""
    done = run(tmp_path, code, modules="('no_such_module',)")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "could not import" in done.stderr


def test_a_child_signals_the_process_that_started_it(tmp_path: Path) -> None:
    """As a scheduler does when it fails."""
    done = run(
        tmp_path,
        """
def child():
    os.kill(os.getppid(), signal.SIGQUIT)
    time.sleep(60)

def main():
    signal.signal(signal.SIGQUIT, lambda *_: (print("signalled", flush=True), os._exit(3)))
    start(child).join()
""",
    )
    assert done.returncode == 3
    assert done.stdout == "signalled\n"


def test_nothing_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
def child():
    print(os.getpid(), os.getppid(), flush=True)
    open(__file__ + ".runs", "w").close()
    time.sleep(600)

def main():
    process = start(child)
    while not os.path.exists(__file__ + ".runs"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    assert done.returncode == -9
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
