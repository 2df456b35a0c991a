"""Prometheus metrics of the scheduler's process, beside SGLang's own."""

from __future__ import annotations

from typing import Any


class Metrics:
    """Counts nothing unless SGLang serves metrics (``--enable-metrics``).

    Args:
        server_args: SGLang's ServerArgs.
    """

    def __init__(self, server_args: Any) -> None:
        self._failures: Any = None
        self._enabled: Any = None
        if not getattr(server_args, "enable_metrics", False):
            return
        # Imported here, as SGLang does: it has set up the folder that the processes share by now.
        from prometheus_client import Counter, Gauge

        labels = ["model_name"]
        self._model = str(server_args.served_model_name or server_args.model_path)
        self._failures = Counter(
            "sglang:a3_failures_total", "Errors in the stages of fusion.", labelnames=[*labels, "stage"]
        )
        self._enabled = Gauge(
            "sglang:a3_fusion_enabled",
            "1 while requests are fused, 0 after fusion was turned off by errors.",
            labelnames=labels,
            multiprocess_mode="mostrecent",
        )
        self._enabled.labels(self._model).set(1)

    def failed(self, stage: str) -> None:
        if self._failures is not None:
            self._failures.labels(self._model, stage).inc()

    def turned_off(self) -> None:
        if self._enabled is not None:
            self._enabled.labels(self._model).set(0)
