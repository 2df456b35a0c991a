"""The card, and what it can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a call, on CUDA by events and after warming up; on a CPU the time of a second call."""
    if DEVICE == "cpu":
        run()
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings(small: bool) -> dict[str, float]:
    """Measured limits of the card: bytes read and written per second, floating-point operations per second."""
    n = 2**16 if small else 2**29
    one, other = (torch.randn(n, device=DEVICE).to(DTYPE) for _ in range(2))
    copy = milliseconds(lambda: other.copy_(one))
    side = 256 if small else 8192
    a, b = (torch.randn(side, side, device=DEVICE).to(DTYPE) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    return {"bytes": 2 * n * one.element_size() / copy * 1e3, "flops": 2 * side**3 / product * 1e3}
