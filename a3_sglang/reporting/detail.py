"""The source of each token of a prompt, for requests that ask with ``{"a3": {"explain": true}}``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from a3_sglang.fusion.request import FusionRequest
from a3_sglang.matching.branches import generation_of
from a3_sglang.matching.span import Span
from a3_sglang.reporting.report import PARTS, Outcome
from a3_sglang.timing import Timings

_DIGITS = 4
"""Significant digits of a relevance."""


def make_detail(outcome: Outcome, fusions: Sequence[tuple[FusionRequest, Timings]]) -> dict[str, Any]:
    """The part of a report that describes every token. Forces a host-device sync.

    Args:
        outcome: of the request.
        fusions: of the steps of its prefill in order, each with its times.

    Returns:
        Plain values with these keys:

        - ``runs``: ``[part, start, end]`` for the whole prompt in order, the part one of :data:`PARTS`.
        - ``spans``: the reused spans in order. ``start`` and ``end`` in the prompt; ``offset``, the position of the
          first token in its donor; ``donor``, a number that spans of the same stretch of a donor have in common;
          ``generation``, 0 if the donor's KV is exact; ``relevance``, a number for every token, or None if the
          selector measured nothing.
        - ``stages``: milliseconds of each stage, ``copy_ms`` and so on, summed over the fusions.
    """
    counts = outcome.parts
    parts = np.full(sum(outcome.counts), PARTS.index("tail"))
    prefix = counts["prefix"]
    parts[:prefix] = PARTS.index("prefix")
    parts[prefix : prefix + counts["continued"]] = PARTS.index("continued")
    spans: list[dict[str, Any]] = []
    stages: Counter[str] = Counter()
    for fusion, timings in fusions:
        parts[fusion.plan.prefix : fusion.plan.end] = PARTS.index("gap")
        for span in fusion.plan.spans:
            parts[span.start : span.end] = PARTS.index("reused")
            spans.append(_origin(span) | {"relevance": _relevance(fusion, span)})
        parts[fusion.recomputed_pos.cpu().numpy()] = PARTS.index("recomputed")
        stages.update(timings.milliseconds())
    bounds = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(parts)]
    runs = [[PARTS[parts[start]], start, end] for start, end in pairwise(bounds)]
    return {"runs": runs, "spans": spans, "stages": {name: round(value, 3) for name, value in stages.items()}}


def _origin(span: Span) -> dict[str, int]:
    segment = span.segment
    position = {"start": span.start, "end": span.end, "offset": span.offset}
    return position | {"donor": segment.number, "generation": generation_of(segment.mark)}


def _relevance(fusion: FusionRequest, span: Span) -> list[float | None] | None:
    if fusion.relevance is None:
        return None
    values = fusion.relevance[span.start : span.end].tolist()
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values]
