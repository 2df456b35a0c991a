"""What the tests of fusions share: selectors that record what they are given, prompts, comparisons with float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.drift.model import DriftModel
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.matching.plan import MIN_TAIL, Plan
from a3_sglang.selectors import ProbeLayers, ReusedRows, Selector
from a3_sglang.selectors.base import Need
from a3_sglang.selectors.probe import Probe
from a3_sglang.timing import Timings
from helpers.reference import Llama
from helpers.scenario import MIN_SPAN, Scenario, executor_for

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

INNER_LAYERS, LAST_LAYERS = ProbeLayers(0.25, 0.75), ProbeLayers(0.5, 1.0)

several = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
prefixes = st.integers(0, 20)
pieces = st.lists(st.tuples(st.integers(0, 12), st.integers(MIN_SPAN, 40)), min_size=1, max_size=4)
"""Gaps and spans; see :meth:`Scenario.prompt`."""
tails = st.integers(MIN_TAIL, 90)


@dataclass(frozen=True)
class RecordingProbe(Probe):
    """The probe over layers 1 and 2 of 4, which selects the highest scores; records the signals it scores."""

    needs: Need = INNER_LAYERS
    corrects_drift: ClassVar[bool] = False
    signals: list[torch.Tensor] = field(default_factory=list, compare=False)

    def score(self, signal: torch.Tensor, rows: ReusedRows) -> torch.Tensor:
        self.signals.append(signal.clone())
        return super().score(signal, rows)

    def select(
        self, scores: Sequence[torch.Tensor], rows: Sequence[ReusedRows], counts: Sequence[int], drift: DriftModel
    ) -> list[torch.Tensor]:
        return Selector.select(self, scores, rows, counts, drift)


def run(executor: Executor, *requests: FusionRequest, timings: Timings | None = None) -> None:
    """Select and recompute all rows of a batch, with no leftover."""
    timings = timings or Timings()
    executor.select(requests, timings)
    assert executor.recompute(requests, timings) == []


def kv(model: Llama, request: FusionRequest) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values per layer in the request's slots, NaN for the prompt's tail; float64."""
    missing = len(request.tokens) - request.plan.end
    tail = torch.full((missing, *model.keys[0].shape[1:]), torch.nan, dtype=torch.float64)
    keys, values = (
        [torch.cat([layer[request.slots].double(), tail]) for layer in pool] for pool in (model.keys, model.values)
    )
    return keys, values


def context(layers: list[torch.Tensor], plan: Plan) -> torch.Tensor:
    """All layers up to the tail, (layers, plan.end, kv_heads, head_dim)."""
    return torch.stack([layer[: plan.end] for layer in layers])


def assert_full_prefill(model: Llama, request: FusionRequest) -> None:
    exact, found = model.prefill64(request.tokens), kv(model, request)
    for part in (0, 1):
        assert_close(context(found[part], request.plan), context(exact[part], request.plan), **TOLERANCE)


def pair(seed: int, ratios: tuple[float, float]) -> tuple[Scenario, Executor, list[FusionRequest]]:
    """Two requests with different prefixes and spans; the same for the same seed."""
    scenario = Scenario(seed)
    executor = executor_for(scenario)
    shapes = ((9, [(4, 30), (0, 20)], 40), (0, [(6, 35), (11, 12), (0, 20)], 75))
    selectors = (RecordingProbe(), Probe(LAST_LAYERS))
    requests = [
        scenario.request(scenario.prompt(*shape), shape[0], selector, ratio, executor)
        for shape, ratio, selector in zip(shapes, ratios, selectors, strict=True)
    ]
    return scenario, executor, requests
