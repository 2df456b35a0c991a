"""Tells what became of each prompt, in the log and in the metrics."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from a3_sglang.cache.report import PARTS, Outcome
from a3_sglang.fusion.executor import Timings
from a3_sglang.metrics import Metrics

logger = logging.getLogger(__name__)


class Account:
    """One line per batch that ends prompts in the log, in the manner of SGLang's own; all of it in the metrics.

    Args:
        metrics: of the process.
        each: whether every request gets a line of its own, too; otherwise only at log level debug.
        title: what the line of a batch begins with.
    """

    def __init__(self, metrics: Metrics, each: bool = False, title: str = "A3 batch") -> None:
        self._title, self._metrics, self._level = title, metrics, logging.INFO if each else logging.DEBUG
        self._running: list[Timings] = []

    def prefilled(self, outcomes: Sequence[tuple[str, Outcome]]) -> None:
        """Prompts whose last step was in one batch.

        Args:
            outcomes: id of each request and what became of its prompt.
        """
        if not outcomes:
            return
        tokens: Counter[str] = Counter()
        results: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for rid, outcome in outcomes:
            self._metrics.prefilled(outcome)
            counts = dict(zip(PARTS, outcome.counts, strict=True))
            tokens.update(counts)
            results[outcome.result] += 1
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            reason = ""
            if outcome.result == "full" and outcome.reason is not None:
                reasons[str(outcome.reason)] += 1
                reason = f" ({outcome.reason})"
            logger.log(self._level, "a3: request %s: %s%s, %s", rid, outcome.result, reason, told)
        parts = [f"#{result}: {results[result]}" for result in ("fused", "continued", "full")]
        parts += [f"#{name}-token: {tokens[name]}" for name in PARTS]
        parts += [f"{reason}: {count}" for reason, count in reasons.items()]
        logger.info("%s, %s", self._title, ", ".join(parts))

    def timed(self, timings: Timings | None) -> None:
        """Count the times of a fused batch, and of those before it, as soon as the device is through with them."""
        if timings is not None:
            self._running.append(timings)
        while self._running and self._running[0].ready():
            self._metrics.took(self._running.pop(0).milliseconds())
