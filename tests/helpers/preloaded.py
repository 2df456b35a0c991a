"""Imported once by the server in :mod:`forking`; its children, SGLang's processes, inherit the modules."""

from __future__ import annotations

import importlib
import os
import signal
import threading

from helpers.forking import die_with_parent

die_with_parent()
# A scheduler that fails sends SIGQUIT to its parent, which is this process; pass it on to the engine's process.
signal.signal(signal.SIGQUIT, lambda *_: os.kill(os.getppid(), signal.SIGQUIT))

for name in os.environ["PRELOAD"].split(","):
    importlib.import_module(name)

if threading.active_count() > 1:
    raise RuntimeError(f"a process with threads cannot be forked: {threading.enumerate()}")
