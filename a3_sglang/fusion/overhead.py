"""The cost of a fusion beyond that of its rows."""

from __future__ import annotations

from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.warm_up import SyntheticPrefill
from a3_sglang.selectors import Selector
from a3_sglang.timing import seconds

REPEATS = 3
LONGER = 2
"""The time per row is taken from a plain prefill that takes this many times as long as one of the fusion's rows."""


def overhead_rows(executor: Executor, selector: Selector) -> int:
    """Rows that a plain prefill computes in the time that a fusion takes besides its own rows and the probe's.

    A fusion copies, probes and predicts, and its passes are short, which makes each of their rows dearer; on a GPU a
    pass of few rows takes as long as one of many. So a prompt is fused only if it saves more rows than this.

    Writes KV of random tokens, so nothing may be in the pool yet; :func:`a3_sglang.fusion.warm_up.warm_up` comes first.

    Args:
        executor: of a pool with room for a few hundred tokens.
        selector: chooses the rows.
    """
    rehearsal, device = SyntheticPrefill(executor, selector), executor.model.keys[0].device

    def fuse() -> None:
        rehearsal.copy()
        rehearsal.fuse(rehearsal.job, one_pass=True)

    def prefill(rows: int) -> float:
        return min(seconds(lambda: rehearsal.compute(rows), device, REPEATS))

    fused = min(seconds(fuse, device, REPEATS))
    job = rehearsal.job
    rows = len(job.recomputed) + job.plan.gap + len(rehearsal.tail) + job.probed_rows
    plain = longer = prefill(rows)
    most, count = min(executor.slice_rows, len(executor.model.keys[0]) - 1), rows
    while longer < LONGER * plain and 2 * count <= most:
        count *= 2
        longer = prefill(count)
    return max(0, round((fused - plain) / longer * count))
