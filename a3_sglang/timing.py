"""Measures how long work takes: by the host's clock, or by the device's own events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds that each of ``repeats`` runs takes, device work included."""
    taken = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        taken.append(time.perf_counter() - started)
    return taken


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timings:
    """Durations of the parts of one batch's fused prefill.

    Args:
        device: where the prefill runs. On CUDA it is timed by the device's events, otherwise (or if None) on the host.
    """

    PARTS = ("copy", "probe", "select", "recompute", "tail")

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._taken: list[tuple[str, Any, Any]] = []
        self.part = self.PARTS[0]
        """The part that started last."""

    @contextmanager
    def add(self, part: str) -> Iterator[None]:
        """A context whose body is timed as ``part``, one of :attr:`PARTS`."""
        self.part = part
        begin = self._now()
        yield
        self._taken.append((part, begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ready(self) -> bool:
        """Whether all timed work is complete, so that :meth:`milliseconds` does not block."""
        return not self._cuda or all(end.query() for _, _, end in self._taken)

    def milliseconds(self) -> dict[str, float]:
        """Duration of each part, as ``copy_ms`` and so on; blocks until all timed work is complete."""
        sums = dict.fromkeys((f"{part}_ms" for part in self.PARTS), 0.0)
        for part, begin, end in self._taken:
            if self._cuda:
                end.synchronize()
            sums[f"{part}_ms"] += begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3
        return sums
