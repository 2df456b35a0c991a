"""The fit of the model of drift: known covariances are found again, and its predictions are those of a fusion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from a3_sglang.drift.correction import DriftPredictor
from a3_sglang.drift.fit import Moments, SpanDrift, fit, modelled
from a3_sglang.drift.model import DEFAULT, Covariance, DriftModel, PaddedBlocks
from a3_sglang.evaluation.calibration import left

OTHER = Covariance(
    shared_sill=0.5,
    shared_range=120,
    local_sill=0.3,
    local_range=9,
    start_variance=3.4,
    variance_decay=0.25,
    min_local_variance=0.4,
    damping=0.6,
)
"""Unlike the default in every parameter."""


def full(covariance: Covariance, rows: int) -> torch.Tensor:
    """Covariance of the first rows of a span, nugget included, float64."""
    offsets = torch.arange(rows)
    return (covariance(offsets, offsets) + covariance.nugget(offsets).diag()).double()


def drawn(
    covariance: Covariance, rows: int, generator: torch.Generator, layers: int = 3, features: int = 96
) -> torch.Tensor:
    """Random drift of a span, (layers, rows, features); every layer has another scale."""
    factor = torch.linalg.cholesky(full(covariance, rows))
    noise = torch.randn(layers, rows, features, dtype=torch.float64, generator=generator)
    return (factor @ noise * torch.tensor([0.01, 1.0, 30.0])[:layers, None, None]).float()


def spans_of(
    covariance: Covariance, generator: torch.Generator, count: int = 24, shown: float = 1.0
) -> list[SpanDrift]:
    """Spans of 150 to 420 rows, of which about 15% were recomputed and showed ``shown`` times their drift."""
    spans = []
    for _ in range(count):
        rows = int(torch.randint(150, 420, (), generator=generator))
        drift = drawn(covariance, rows, generator)
        observed = torch.randperm(rows, generator=generator)[: rows * 15 // 100].sort().values
        spans.append(SpanDrift.of(drift, observed, shown * drift[:, observed]))
    return spans


@pytest.mark.parametrize("true", [DEFAULT.keys, DEFAULT.values, OTHER])
def test_a_known_covariance_is_found_again(true: Covariance, generator: torch.Generator) -> None:
    found = fit(spans_of(true, generator))
    expected, fitted = (full(covariance, 400) for covariance in (true, found))
    scale = expected.diagonal().sqrt()
    # The unit of variance is of no account.
    error = (fitted * (expected.trace() / fitted.trace()) - expected) / scale / scale[:, None]
    assert error.abs().max() < 0.12
    assert error.square().mean().sqrt() < 0.02
    assert found.start_variance == pytest.approx(true.start_variance, rel=0.12)
    assert found.variance_decay == pytest.approx(true.variance_decay, rel=0.15)
    assert found.local_range == pytest.approx(true.local_range, rel=0.35)
    assert found.shared_sill == pytest.approx(true.shared_sill, abs=0.08)


def test_damping_undoes_what_observed_drift_exaggerates(generator: torch.Generator) -> None:
    assert fit(spans_of(OTHER, generator, shown=1.0)).damping == pytest.approx(1, abs=0.03)
    assert fit(spans_of(OTHER, generator, shown=2.0)).damping == pytest.approx(0.5, abs=0.015)
    # It never amplifies.
    assert fit(spans_of(OTHER, generator, shown=0.5)).damping == 1


def test_a_fit_leaves_less_drift_than_a_wrong_model(generator: torch.Generator) -> None:
    fitted, others = fit(spans_of(OTHER, generator)), spans_of(OTHER, generator, count=12)
    best = left(others, replace(OTHER, damping=1))
    assert left(others, fitted) == pytest.approx(best, rel=0.01)
    wrong = replace(DEFAULT.keys, local_range=0.5, shared_range=10)
    assert left(others, wrong) > 1.1 * best
    assert left(others, fitted, seed=1) == pytest.approx(left(others, OTHER, seed=1), rel=0.01)


def test_what_is_left_is_what_the_correction_leaves(generator: torch.Generator) -> None:
    """Predicted row by row with the weights of a fusion."""
    drift = drawn(OTHER, 300, generator, layers=2)
    observed = torch.randperm(300, generator=generator)[:45].sort().values
    shown = drift[:, observed] * 1.3 + 0.1 * torch.randn(2, 45, drift.shape[2], generator=generator)
    predictor = DriftPredictor(DriftModel(OTHER, OTHER), observed, PaddedBlocks([300], "cpu"), 300)
    others = torch.ones(300, dtype=torch.bool).index_fill_(0, observed, False)
    shares = []
    for layer in range(2):
        predicted = predictor.predict_keys(shown[layer][:, None])[:, 0]
        error, total = (x[others].double().square().sum() for x in (drift[layer] - predicted, drift[layer]))
        unit = (drift[layer].double().square().sum(1) / DEFAULT.keys.variance(torch.arange(300))).mean()
        shares.append((error / unit, total / unit))
    expected = sum(error for error, _ in shares) / sum(total for _, total in shares)
    assert left([SpanDrift.of(drift, observed, shown)], OTHER) == pytest.approx(float(expected), rel=1e-4)


def test_moments_are_means_over_pairs(generator: torch.Generator) -> None:
    spans = spans_of(OTHER, generator, count=3)
    moments = Moments.of(spans)
    assert moments.pairs.sum() == sum(n * (n + 1) // 2 for n in (len(span.drift) for span in spans))
    # Offsets and distances up to 3 have bins of their own.
    cell = ((moments.offset == 2) & (moments.distance == 3)).nonzero().item()
    assert moments.pairs[cell] == 3
    assert_close(float(moments.covariance[cell]), float(sum(span.drift[2, 5] for span in spans) / 3))
    # The model's own values, in another unit.
    scaled = replace(moments, covariance=7 * modelled(OTHER, moments))
    assert scaled.unit == pytest.approx(7 * float(OTHER.variance(torch.arange(64, 256)).mean()), rel=0.05)
    own = scaled.distance == 0
    assert_close(scaled.variance(scaled.offset[own]), scaled.covariance[own])


def test_layers_without_drift_do_not_count(generator: torch.Generator) -> None:
    drift, observed = drawn(OTHER, 200, generator, layers=2), torch.arange(0, 200, 7)
    with_still = torch.cat([torch.zeros(1, 200, drift.shape[2]), drift])
    one, other = (SpanDrift.of(x, observed, x[:, observed]) for x in (drift, with_still))
    assert_close(one.drift, other.drift)
    assert_close(one.cross, other.cross)


def test_what_cannot_be_fitted_is_an_error(generator: torch.Generator) -> None:
    short = drawn(OTHER, 100, generator)
    with pytest.raises(ValueError, match="128 tokens"):
        fit([SpanDrift.of(short, torch.arange(9), short[:, :9])])
    drift, none = drawn(OTHER, 200, generator), torch.arange(0)
    with pytest.raises(ValueError, match="no row that was recomputed"):
        fit([SpanDrift.of(drift, none, drift[:, none])])
    still = torch.zeros(2, 200, 8)
    with pytest.raises(ValueError, match="do not drift"):
        fit([SpanDrift.of(still, none, still[:, none])])
