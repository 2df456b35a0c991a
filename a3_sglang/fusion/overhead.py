"""The cost of a fusion beyond that of its rows."""

from __future__ import annotations

from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.warm_up import SyntheticPrefill
from a3_sglang.selectors import Selector
from a3_sglang.timing import seconds

REPEATS = 3
LONGER = 2
"""The time per row is taken from a plain prefill that takes at least this many times as long as one with as many rows
as the fusion."""


def overhead_rows(executor: Executor, selector: Selector) -> int:
    """How much longer a fusion takes than a plain prefill of as many rows, probe included; in rows of a plain prefill.

    A fusion copies, probes and predicts, and its short passes make each row more expensive: on a GPU a pass of few
    rows takes as long as one of many. So a prompt is fused only if it saves more rows than this.

    Overwrites KV with that of random tokens, so the pool must be empty;
    :func:`a3_sglang.fusion.warm_up.warm_up` comes first.

    Args:
        executor: of a pool with room for a few hundred tokens.
        selector: chooses the rows.
    """
    synthetic, device = SyntheticPrefill(executor, selector), executor.model.keys[0].device

    def fuse() -> None:
        synthetic.copy()
        synthetic.fuse(synthetic.request, room=executor.slice_rows)

    def prefill(rows: int) -> float:
        return min(seconds(lambda: synthetic.compute(rows), device, REPEATS))

    fused = min(seconds(fuse, device, REPEATS))
    request = synthetic.request
    rows = len(request.recomputed_pos) + request.plan.gap + len(synthetic.tail_pos) + request.probed_rows
    plain = longer = prefill(rows)
    most, count = min(executor.slice_rows, len(executor.model.keys[0]) - 1), rows
    while longer < LONGER * plain and 2 * count <= most:
        count *= 2
        longer = prefill(count)
    return max(0, round((fused - plain) / longer * count))
