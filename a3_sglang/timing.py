"""Measures how long work on a device takes, as the host sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
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
