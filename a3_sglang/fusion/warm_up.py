"""A fused prefill of random tokens before the first request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from a3_sglang.attention.row_attention import RequestRows
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.interface import UnsupportedModelError
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.plan import QUESTION_TOKENS, make_plan
from a3_sglang.rope import rotate
from a3_sglang.selectors import Full, Selector
from a3_sglang.timing import Timings

DONOR, GAP, RATIO = 160, 5, 0.15


class SyntheticPrefill:
    """A prefill of random tokens, fused or plain. It writes KV, so nothing may be in the pool yet.

    Args:
        executor: of a pool with room for a few hundred tokens.
        selector: chooses the rows.

    Attributes:
        job: the fused prefill.
        tail: int64, positions after its plan.
    """

    def __init__(self, executor: Executor, selector: Selector) -> None:
        random = np.random.default_rng(0)
        donor, gap, question = (random.integers(0, 100, n, dtype=np.int32) for n in (DONOR, GAP, QUESTION_TOKENS))
        prompt = np.concatenate([donor[DONOR // 2 :], gap, donor[: DONOR // 2], question])
        index = AnyPositionIndex(DONOR // 4)
        index.add("warm-up", donor)
        plan = make_plan(index.find("warm-up", prompt, 0), 0, len(prompt), len(prompt), 1)
        assert plan is not None
        self._executor, device = executor, executor.model.keys[0].device
        # Slot 0 is SGLang's padding slot.
        free = torch.arange(1, 1 + DONOR + len(prompt), device=device)
        self._sources = torch.cat([free[span.offset : span.offset + span.length] for span in plan.spans])
        self._slots = free[DONOR:]
        tokens = torch.from_numpy(prompt).long().to(device)
        self.job = FusionRequest(plan, tokens, self._slots[: plan.end], selector, RATIO)
        self.tail = torch.arange(plan.end, len(prompt), device=device)

    def copy(self) -> None:
        """Copy the spans."""
        self._executor.fill(self.job, self._sources)

    def fuse(self, job: FusionRequest, one_pass: bool) -> None:
        """Choose rows, recompute them and extend; ``one_pass``: recompute in the pass of the extend."""
        executor, tail = self._executor, self.tail
        left = executor.prepare([job], Timings(), 0 if one_pass else executor.slice_rows)
        group = RequestRows(0, len(tail), self._slots, tail + 1, job.exact)
        with executor.extended(left, [group], self._slots[tail]):
            executor.model.extend(job.tokens[tail], tail)

    def compute(self, rows: int) -> None:
        """A plain prefill of ``rows`` rows."""
        executor, device = self._executor, self.tail.device
        slots = torch.arange(1, 1 + rows, device=device)
        tokens, positions = self.job.tokens.repeat(1 + rows // len(self.job.tokens))[:rows], slots % DONOR
        group = RequestRows(0, rows, slots, torch.arange(1, 1 + rows, device=device), True)
        with executor.extended([], [group], slots):
            executor.model.extend(tokens, positions)


def warm_up(executor: Executor, selector: Selector) -> FusionRequest:
    """Compile what a device has to compile, and see that all that requests will need runs.

    Writes KV of random tokens, so nothing may be in the pool yet.

    Args:
        executor: of a pool with room for a few hundred tokens.
        selector: chooses the rows.

    Returns:
        What ran.

    Raises:
        UnsupportedModelError: a token's keys at two positions do not differ by the rotation between them.
        Exception: whatever else goes wrong.
    """
    rehearsal = SyntheticPrefill(executor, selector)
    rehearsal.copy()
    whole = replace(rehearsal.job, selector=Full())
    for one in (rehearsal.job, whole):
        # Both ways to recompute: in a separate pass, and within the extend of the tail.
        for one_pass in (False, True):
            rehearsal.fuse(one, one_pass)
    _check_keys(executor, whole)
    return rehearsal.job


def _check_keys(executor: Executor, job: FusionRequest) -> None:
    """Keys of layer 0 know only their token and its position, so equal tokens show how the model turns keys."""
    keys, rope = executor.model.keys[0], executor.model.ropes[0]
    order = job.tokens[: job.plan.end].sort(stable=True)
    same = (order.values[1:] == order.values[:-1]).nonzero().squeeze(1)
    one, other = order.indices[same], order.indices[same + 1]
    turned = rotate(keys[job.slots[one]], *rope.turn(one, other), rope.neox).float()
    expected = keys[job.slots[other]].float()
    error = (turned - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    # One rounding of either key and one of the turned.
    if not bool((error < 8 * torch.finfo(keys.dtype).eps).all()):
        raise UnsupportedModelError(
            f"the keys that reach the model's attention do not turn as its RoPE says (off by {float(error.max()):.3g})"
        )
