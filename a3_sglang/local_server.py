"""A temporary server on the loopback interface: for the demo, tests, `explain` and the pictures of the docs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 300
_STOP_SECONDS = 15


class StartError(RuntimeError):
    """The server did not start; the message has the last lines of its log."""


@contextmanager
def local_server(
    model: str, log: Path, *arguments: str, variables: Mapping[str, str] | None = None, port: int | None = None
) -> Iterator[str]:
    """Run ``a3_sglang.launch_server``; it and its processes are stopped on exit.

    Args:
        model: folder or Hub id.
        log: file that receives the server's output.
        arguments: of the server, for example ``"--dtype", "float32"``.
        variables: added to this process's environment.
        port: a free port by default.

    Yields:
        The server's URL, once it answers.

    Raises:
        StartError: the server exited before it answered, or did not answer within :data:`START_SECONDS`.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    module = [sys.executable, "-P", "-m", "a3_sglang.launch_server"]
    command = [*module, "--model-path", model, "--host", "127.0.0.1", "--port", str(port), *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(variables or {})
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait(server, url, log)
            yield url
        finally:
            _stop(server)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    started = time.monotonic()
    while True:
        if server.poll() is not None or time.monotonic() - started > START_SECONDS:
            lines = log.read_text(errors="replace").splitlines()
            raise StartError("the server did not start; its last lines:\n" + "\n".join(lines[-15:]))
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return
        time.sleep(0.5)


def _stop(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(timeout=_STOP_SECONDS)
