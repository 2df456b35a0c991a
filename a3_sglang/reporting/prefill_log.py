"""Logs how the KV of prompts was obtained, and counts it in the metrics."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from a3_sglang.reporting.metrics import Metrics
from a3_sglang.reporting.report import PARTS, Outcome
from a3_sglang.timing import Timings

logger = logging.getLogger(__name__)


class PrefillLog:
    """Logs one line per batch that completes prompts, in the format of SGLang's own, and updates the metrics.

    Args:
        metrics: of the process.
        each: log one line per request at level info instead of debug.
        title: start of a batch's line.
    """

    def __init__(self, metrics: Metrics, each: bool = False, title: str = "A3 batch") -> None:
        self._title, self._metrics, self._level = title, metrics, logging.INFO if each else logging.DEBUG
        self._running: list[Timings] = []

    def completed(self, outcomes: Sequence[tuple[str, Outcome]]) -> None:
        """Record the prompts that one batch has completed.

        Args:
            outcomes: id and outcome of each request.
        """
        if not outcomes:
            return
        tokens: Counter[str] = Counter()
        results: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for rid, outcome in outcomes:
            self._metrics.prefilled(outcome)
            tokens.update(outcome.parts)
            results[outcome.result] += 1
            reason = ""
            if outcome.why:
                reasons[outcome.why] += 1
                reason = f" ({outcome.why})"
            counts = ", ".join(f"{name} {count}" for name, count in outcome.parts.items())
            logger.log(self._level, "a3: request %s: %s%s, %s", rid, outcome.result, reason, counts)
        parts = [f"#{result}: {results[result]}" for result in ("fused", "continued", "full")]
        parts += [f"#{name}-token: {tokens[name]}" for name in PARTS]
        parts += [f"{reason}: {count}" for reason, count in reasons.items()]
        logger.info("%s, %s", self._title, ", ".join(parts))

    def timed(self, timings: Timings) -> None:
        """Record the times of a fused batch in the metrics, as soon as the device has finished it."""
        self._running.append(timings)
        while self._running and self._running[0].ready():
            self._metrics.stages_took(self._running.pop(0).milliseconds())
