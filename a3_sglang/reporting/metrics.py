"""Prometheus metrics of the scheduler's process, beside SGLang's own."""

from __future__ import annotations

from typing import Any

from a3_sglang.reporting.report import Outcome

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Upper bounds of the buckets of stages' times."""


class Metrics:
    """Counts nothing unless SGLang serves metrics (``--enable-metrics``).

    Args:
        server_args: SGLang's ServerArgs.
        observing: the counts are of what would be reused; their names then start with ``sglang:a3_observed_``.

    Attributes:
        on: whether metrics are served.
    """

    def __init__(self, server_args: Any, observing: bool = False) -> None:
        self.on = bool(getattr(server_args, "enable_metrics", False))
        if not self.on:
            return
        # Imported here, as SGLang does: it has set up the folder that the processes share by now.
        from prometheus_client import Counter, Gauge, Histogram

        prefix = "sglang:a3_observed_" if observing else "sglang:a3_"
        model = str(server_args.served_model_name or server_args.model_path)

        def labelled(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            metric = kind(prefix + name, text, labelnames=["model_name", *labels], **more)
            return lambda *values: metric.labels(model, *values)

        latest = {"multiprocess_mode": "mostrecent"}
        self._tokens = labelled(
            Counter, "tokens_total", "Tokens of prompts, by where their KV came from (exact: from the tree).", "kind"
        )
        self._requests = labelled(
            Counter,
            "requests_total",
            "Prompts, by what became of them (fused, continued, full) and why they were not fused.",
            "result",
            "reason",
        )
        self._stages = labelled(
            Histogram, "stage_seconds", "Time of the stages of fused batches.", "stage", buckets=_SECONDS
        )
        self._failures = labelled(Counter, "failures_total", "Errors in the stages of fusion.", "stage")
        self._indexed = labelled(Gauge, "indexed_tokens", "Tokens that can be reused, by kind of KV.", "kind", **latest)
        self._enabled = labelled(Gauge, "fusion_enabled", "1, or 0 after fusion was turned off by errors.", **latest)
        self._enabled().set(1)

    def failed(self, stage: str) -> None:
        if self.on:
            self._failures(stage).inc()

    def turned_off(self) -> None:
        if self.on:
            self._enabled().set(0)

    def prefilled(self, outcome: Outcome) -> None:
        """A prompt was computed."""
        if not self.on:
            return
        for part, count in outcome.parts.items():
            self._tokens("exact" if part == "prefix" else part).inc(count)
        self._requests(outcome.result, outcome.why).inc()

    def took(self, milliseconds: dict[str, float]) -> None:
        """The stages of a fused batch took so long; see :meth:`a3_sglang.timing.Timings.milliseconds`."""
        if self.on:
            for stage, taken in milliseconds.items():
                self._stages(stage.removesuffix("_ms")).observe(taken / 1e3)

    def indexed(self, exact: int, approximate: int) -> None:
        """So many tokens can be reused now."""
        if self.on:
            self._indexed("exact").set(exact)
            self._indexed("approximate").set(approximate)
