"""What the metrics say when fusion fails."""

from __future__ import annotations

from types import SimpleNamespace

import prometheus_client
import pytest

from a3_sglang.integration.circuit_breaker import LIMIT, CircuitBreaker
from a3_sglang.reporting.metrics import Metrics


def sample(name: str, **labels: str) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(name, {"model_name": "tiny", **labels})


def test_metrics_count_failures_and_show_that_fusion_is_off(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics(SimpleNamespace(enable_metrics=True, served_model_name="tiny", model_path="/tiny"))
    breaker = CircuitBreaker(metrics.failed, metrics.turned_off)
    assert sample("sglang:a3_fusion_enabled") == 1
    for number in range(LIMIT):
        assert not breaker.open
        try:
            raise RuntimeError(f"number {number}")
        except RuntimeError:
            breaker.failed("probe")
    assert breaker.open
    assert sample("sglang:a3_failures_total", stage="probe") == LIMIT
    assert sample("sglang:a3_fusion_enabled") == 0
    assert caplog.text.count("off after 3 failures") == 1
    assert f"number {LIMIT - 1}" in caplog.text


def test_without_metrics_nothing_is_counted() -> None:
    metrics = Metrics(SimpleNamespace(enable_metrics=False))
    metrics.failed("probe")
    metrics.turned_off()
