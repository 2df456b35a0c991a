"""What the server in :mod:`forking` imports once; its children, SGLang's processes, have it from the start."""

from __future__ import annotations

import importlib
import os
import signal
import threading

from helpers.forking import die_with_parent

die_with_parent()
# A scheduler that fails sends SIGQUIT to its parent, which here stands between it and the engine's process.
signal.signal(signal.SIGQUIT, lambda *_: os.kill(os.getppid(), signal.SIGQUIT))

for name in os.environ["PRELOAD"].split(","):
    importlib.import_module(name)

if threading.active_count() > 1:
    raise RuntimeError(f"a process with threads cannot be forked: {threading.enumerate()}")
