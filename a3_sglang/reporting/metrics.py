"""Prometheus metrics of the scheduler's process, beside SGLang's own."""

from __future__ import annotations

from typing import Any

from a3_sglang.reporting.report import Outcome

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Upper bounds of the histogram buckets of the stages' times, in seconds."""


class Metrics:
    """Counters, gauges and histograms; no-ops unless SGLang serves metrics (``--enable-metrics``).

    Args:
        server_args: SGLang's ServerArgs.
        observing: they count predicted reuse, with names that start with ``sglang:a3_observed_``.

    Attributes:
        on: whether metrics are served.
    """

    def __init__(self, server_args: Any, observing: bool = False) -> None:
        self.on = bool(getattr(server_args, "enable_metrics", False))
        if not self.on:
            return
        # Imported here, as in SGLang, which by now has set up the folder that the processes share.
        from prometheus_client import Counter, Gauge, Histogram

        prefix = "sglang:a3_observed_" if observing else "sglang:a3_"
        model = str(server_args.served_model_name or server_args.model_path)

        def labelled(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            metric = kind(prefix + name, text, labelnames=["model_name", *labels], **more)
            return lambda *values: metric.labels(model, *values)

        latest = {"multiprocess_mode": "mostrecent"}
        self._tokens = labelled(
            Counter, "tokens_total", "Tokens of prompts, by source of their KV (exact: from the tree).", "kind"
        )
        self._requests = labelled(
            Counter,
            "requests_total",
            "Prompts, by result (fused, continued, full) and reason for a full prefill.",
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
        """Count an error in a stage."""
        if self.on:
            self._failures(stage).inc()

    def turned_off(self) -> None:
        """Note that fusion was turned off."""
        if self.on:
            self._enabled().set(0)

    def prefilled(self, outcome: Outcome) -> None:
        """Count a prompt whose prefill is complete."""
        if not self.on:
            return
        for part, count in outcome.parts.items():
            self._tokens("exact" if part == "prefix" else part).inc(count)
        self._requests(outcome.result, outcome.why).inc()

    def stages_took(self, milliseconds: dict[str, float]) -> None:
        """Record the times of a fused batch; see :meth:`a3_sglang.timing.Timings.milliseconds`."""
        if self.on:
            for stage, duration in milliseconds.items():
                self._stages(stage.removesuffix("_ms")).observe(duration / 1e3)

    def indexed(self, exact: int, approximate: int) -> None:
        """Set the number of tokens that can be reused now."""
        if self.on:
            self._indexed("exact").set(exact)
            self._indexed("approximate").set(approximate)
