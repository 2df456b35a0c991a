"""What a fusion costs on a device besides its rows."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.warm_up import Rehearsal
from a3_sglang.selectors import Selector

REPEATS = 3
LONGER = 2
"""A prefill whose time tells the time of a row takes so many times as long as one of as many rows as a fusion has."""


def overhead_rows(executor: Executor, selector: Selector) -> int:
    """Rows that a plain prefill computes in the time that a fusion takes besides its own rows and the probe's.

    A fusion copies, probes and predicts, and its passes are short, which makes each of their rows dearer; on a GPU a
    pass of few rows takes as long as one of many. So a prompt is fused only if it saves more rows than this.

    Writes KV of random tokens, so nothing may be in the pool yet; :func:`a3_sglang.fusion.warm_up.warm_up` comes first.

    Args:
        executor: of a pool with room for a few hundred tokens.
        selector: chooses the rows.
    """
    rehearsal, device = Rehearsal(executor, selector), executor.model.keys[0].device

    def fuse() -> None:
        rehearsal.copy()
        rehearsal.fuse(rehearsal.job, 0)

    fused = _seconds(fuse, device)
    job = rehearsal.job
    rows = len(job.recomputed) + job.plan.gap + len(rehearsal.tail) + job.probed_rows
    plain = longer = _seconds(lambda: rehearsal.compute(rows), device)
    most, count = min(executor.slice_rows, len(executor.model.keys[0]) - 1), rows
    while longer < LONGER * plain and 2 * count <= most:
        count *= 2
        longer = _seconds(lambda: rehearsal.compute(count), device)  # noqa: B023 - called at once
    return max(0, round((fused - plain) / longer * count))


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """The shortest time of a few runs."""
    taken = []
    for _ in range(REPEATS):
        _settle(device)
        started = time.perf_counter()
        run()
        _settle(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
