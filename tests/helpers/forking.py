"""Forks SGLang's processes from a server that has imported SGLang, so that they need not import it again.

SGLang starts its processes with multiprocessing's method "spawn". :func:`install` replaces this method in the tests'
process by "forkserver", with SGLang imported in the server. As with "spawn", the child gets the environment at the time
of its start, and runs the same code. Linux only.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing.context
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.popen_forkserver import Popen
from pathlib import Path
from typing import Any
from unittest.mock import patch

PRELOAD = (
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
)
READ_AT_IMPORT = ("SGLANG_", "ATEN_", "ONEDNN_", "OMP_")
"""Prefixes of variables that modules may read at import: if one changes, the server is restarted."""
PR_SET_PDEATHSIG = 1

_server: Any = forkserver._forkserver  # type: ignore[attr-defined]
_environment: dict[str, str] = {}
_preload: tuple[str, ...] = ()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def enter(environment: dict[str, str], target: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run ``target`` in a forked process as in a spawned one.

    Raises:
        RuntimeError: the server could not import the modules.
    """
    if "helpers.preloaded" not in sys.modules:
        raise RuntimeError(f"the fork server could not import {Path(__file__).with_name('preloaded.py')}")
    die_with_parent()
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    target(*args, **kwargs)


def start() -> None:
    """Start the server, unless it runs and the variables that it read are unchanged."""
    global _environment
    now = {name: value for name, value in os.environ.items() if name.startswith(READ_AT_IMPORT)}
    now.pop("SGLANG_RUN_ID", None)
    if _server._forkserver_pid is not None and now != _environment:
        os.kill(_server._forkserver_pid, signal.SIGKILL)
        # WNOWAIT leaves the process to be collected by forkserver's own check.
        os.waitid(os.P_PID, _server._forkserver_pid, os.WEXITED | os.WNOWAIT)
    _environment = now
    with patch.dict(os.environ, {"PYTHONPATH": str(Path(__file__).parents[1]), "PRELOAD": ",".join(_preload)}):
        forkserver.ensure_running()


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process: Any) -> Popen:  # noqa: N802
        start()
        process._args = (dict(os.environ), process._target, *process._args)
        process._target = enter
        return Popen(process)


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


def install(preload: tuple[str, ...] = PRELOAD) -> None:
    """Make the start method "spawn" fork from the server, which starts importing at once."""
    global _preload
    _preload = preload
    multiprocessing.set_forkserver_preload(["helpers.preloaded"])
    multiprocessing.context._concrete_contexts["spawn"] = _Context()  # type: ignore[attr-defined]
    start()


def spare_server() -> None:
    """Exempt the server when SGLang ends an engine, which kills all children of this process."""
    module = importlib.import_module("sglang.srt.entrypoints.engine")
    kill = module.kill_process_tree

    def kill_others(*args: Any, **kwargs: Any) -> None:
        kill(*args, **{"skip_pid": _server._forkserver_pid} | kwargs)

    module.kill_process_tree = kill_others
