"""A fused prefill of random tokens before the first request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from a3_sglang.attention.base import AttentionSpec, RequestRows
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.interface import AttentionHook, Model, UnsupportedModelError
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.plan import QUESTION_TOKENS, make_plan
from a3_sglang.matching.search import find_spans
from a3_sglang.rope import rotate
from a3_sglang.selectors import Selector
from a3_sglang.selectors.full import Full
from a3_sglang.timing import Timings

DONOR, GAP, RATIO = 160, 5, 0.15
KEYS_CHECKED = 64
"""Tokens whose keys are compared at two positions."""


class SyntheticPrefill:
    """A prefill of random tokens, fused or plain. It overwrites KV, so the pool must be empty.

    Args:
        executor: of a pool with room for a few hundred tokens.
        selector: chooses the rows.

    Attributes:
        request: the fused prefill.
        tail_pos: int64, positions after its plan.
    """

    def __init__(self, executor: Executor, selector: Selector) -> None:
        random = np.random.default_rng(0)
        donor, gap, question = (random.integers(0, 100, n, dtype=np.int32) for n in (DONOR, GAP, QUESTION_TOKENS))
        prompt = np.concatenate([donor[DONOR // 2 :], gap, donor[: DONOR // 2], question])
        index = AnyPositionIndex(DONOR // 4)
        index.add("warm-up", donor)
        plan = make_plan(find_spans(index, "warm-up", prompt, 0), 0, len(prompt), len(prompt), 1)
        assert plan is not None
        self._executor, device = executor, executor.model.keys[0].device
        # Slot 0 is SGLang's padding slot.
        free_slots = torch.arange(1, 1 + DONOR + len(prompt), device=device)
        self._donor_slots = torch.cat([free_slots[span.offset : span.offset + span.length] for span in plan.spans])
        self._slots = free_slots[DONOR:]
        tokens = torch.from_numpy(prompt).long().to(device)
        self.request = FusionRequest(plan, tokens, self._slots[: plan.end], selector, RATIO)
        self.tail_pos = torch.arange(plan.end, len(prompt), device=device)

    def copy(self) -> None:
        """Copy the spans."""
        self._executor.copy(self.request, self._donor_slots)

    def fuse(self, request: FusionRequest, room: int) -> None:
        """Select rows, recompute them and run the tail, with up to ``room`` of them in its forward pass."""
        executor, tail_pos, timings = self._executor, self.tail_pos, Timings()
        executor.select([request], timings)
        leftover = executor.recompute([request], timings, room)
        rows = RequestRows(0, len(tail_pos), self._slots, tail_pos + 1, request.exact)
        with executor.with_leftover(leftover, [rows], self._slots[tail_pos]):
            executor.model.extend(request.tokens[tail_pos], tail_pos)

    def compute(self, count: int) -> None:
        """A plain prefill of ``count`` rows."""
        executor, device = self._executor, self.tail_pos.device
        slots = torch.arange(1, 1 + count, device=device)
        tokens = self.request.tokens.repeat(1 + count // len(self.request.tokens))[:count]
        rows = RequestRows(0, count, slots, torch.arange(1, 1 + count, device=device), True)
        with executor.with_leftover([], [rows], slots):
            # The time does not depend on the positions; these are in any RoPE table.
            executor.model.extend(tokens, torch.arange(count, device=device) % DONOR)


def warm_up(executor: Executor, selector: Selector) -> FusionRequest:
    """Compile the device's kernels, and check that everything requests will need runs.

    Overwrites KV with that of random tokens, so the pool must be empty.

    Args:
        executor: of a pool with room for a few hundred tokens.
        selector: chooses the rows.

    Returns:
        The request that ran.

    Raises:
        UnsupportedModelError: see :func:`check_keys`.
        Exception: any other failure; unlike for a request, there is no fallback.
    """
    check_keys(executor.model)
    prefill = SyntheticPrefill(executor, selector)
    prefill.copy()
    full = replace(prefill.request, selector=Full())
    for request in (prefill.request, full):
        # Rows are recomputed in separate passes or in that of the tail: run both ways.
        for room in (0, executor.slice_rows):
            prefill.fuse(request, room)
    return prefill.request


class _OwnKeys(AttentionHook):
    """Each row attends to itself only, so what a layer gets does not depend on positions; keeps the layers' keys."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        self.keys.append(key.clone())
        return value.repeat_interleave(query.shape[1] // key.shape[1], 1)


def check_keys(model: Model) -> None:
    """Check how the model rotates keys: the same tokens at two positions, without any context, in every layer.

    Raises:
        UnsupportedModelError: in some layer the keys do not differ by the rotation between the positions.
    """
    generator, device = torch.Generator().manual_seed(0), model.keys[0].device
    tokens = torch.randint(0, 100, (KEYS_CHECKED,), generator=generator).to(device)
    reach = min(rope.cos_sin.shape[0] for rope in model.ropes.values())
    old_pos, new_pos = torch.randint(0, reach, (2, KEYS_CHECKED), generator=generator).to(device)
    old, new = _OwnKeys(), _OwnKeys()
    model.forward(tokens, old_pos, old)
    model.forward(tokens, new_pos, new)
    for layer, (key, expected) in enumerate(zip(old.keys, new.keys, strict=True)):
        rope = model.ropes[layer]
        rotated, expected = rotate(key, *rope.rotation(old_pos, new_pos), rope.neox).float(), expected.float()
        error = (rotated - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        # Rounding of both keys and of the rotated one.
        if not bool((error < 8 * torch.finfo(key.dtype).eps).all()):
            raise UnsupportedModelError(
                f"the keys with which layer {layer} attends do not follow its RoPE (off by {float(error.max()):.3g})"
            )
