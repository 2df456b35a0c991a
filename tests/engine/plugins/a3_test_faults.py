"""A plugin for SGLang that makes stages of a fusion fail, for tests/engine/test_faults.py.

The file that ``A3_TEST_FAULTS`` names holds the stages that are to fail, one per line; each fails once, in that order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "A3_TEST_FAULTS"
STAGES = (
    "indexing",
    "search",
    "admission",
    "slots",
    "copy",
    "probe",
    "select",
    "recompute",
    "extend",
    "full recompute",
    "detail",
)
LAYER = 3
"""In the stage ``extend``, attention of this layer fails, so that only the layers before it have new KV."""


def register() -> None:
    """Called by SGLang in every process it starts."""
    if VARIABLE not in os.environ:
        return
    from a3_sglang.fusion import executor, passes
    from a3_sglang.fusion.request import FusionRequest
    from a3_sglang.integration import compat, prefill
    from a3_sglang.integration.radix_cache import A3RadixCache
    from a3_sglang.matching.index import AnyPositionIndex
    from a3_sglang.matching.search import PromptSearch

    targets = (AnyPositionIndex, "add"), (PromptSearch, "spans"), (A3RadixCache, "donor_slots"), (compat, "allocate")
    more = (executor.Executor, "copy"), (executor.Executor, "_probe"), (executor, "_select")
    last = (executor.Executor, "recompute"), (passes.RecomputePass, "attend"), (FusionRequest, "select_all")
    report = ((prefill, "make_detail"),)
    for stage, (owner, name) in zip(STAGES, (*targets, *more, *last, *report), strict=True):
        setattr(owner, name, _failing(stage, getattr(owner, name)))


def _failing(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if (stage != "extend" or args[1] == LAYER) and _due(stage):
            raise RuntimeError(f"injected into {stage}")
        return function(*args, **kwargs)

    return call


def _due(stage: str) -> bool:
    path = Path(os.environ[VARIABLE])
    left = path.read_text().splitlines() if path.exists() else []
    if not left or left[0] != stage:
        return False
    path.write_text("\n".join(left[1:]))
    return True
