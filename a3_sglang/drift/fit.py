"""Fits the model of drift in ``drift/model.py`` to measured drift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from a3_sglang.drift.model import DEFAULT, MAX_BLOCK, MIN_NUGGET, Covariance

_EDGES = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, MAX_BLOCK])
"""First offset, or distance, of each bin; the last is the end."""
_INSIDE = 64, 256
"""Offsets that are well inside a span, first and end."""
_PRIOR = 1e-4
"""Weight of the squared change of a parameter from :data:`~a3_sglang.drift.model.DEFAULT`, added to the mean
squared error of the covariances: enough to keep parameters that the data do not determine."""


@dataclass(frozen=True)
class SpanDrift:
    """Second moments of the drift of keys, or of values, in one copied span; summed over heads, averaged over layers.

    Drift is divided by its standard deviation in its layer, so that all layers count the same.

    Attributes:
        drift: float32 (n, n), of the drift of its first n rows with itself.
        observed: int64 (m,), which of the rows a fused prefill recomputed.
        observed_drift: float32 (m, m), of the drift that these rows showed then, fresh minus copied KV; it is not all
            of their drift, as they attend to rows that are stale themselves.
        cross: float32 (n, m), of the drift of all rows with that of the observed ones.
    """

    drift: torch.Tensor
    observed: torch.Tensor
    observed_drift: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, drift: torch.Tensor, observed: torch.Tensor, observed_drift: torch.Tensor) -> SpanDrift:
        """The moments of one span.

        Args:
            drift: (layers, n, features), n at most :data:`~a3_sglang.drift.model.MAX_BLOCK`: fresh minus copied KV of
                the span's first rows, keys as they were before RoPE.
            observed: int64 (m,), as in the class.
            observed_drift: (layers, m, features).
        """
        drift, observed_drift = drift.float(), observed_drift.float()
        expected = DEFAULT.keys.variance(torch.arange(drift.shape[1]))
        unit = (drift.square().sum(2) / expected).mean(1)
        drifting = unit > 0
        scale = (unit[drifting] * int(drifting.sum())).rsqrt()[:, None, None]
        all_rows, seen = ((x[drifting] * scale).transpose(0, 1).flatten(1) for x in (drift, observed_drift))
        return cls(all_rows @ all_rows.T, observed, seen @ seen.T, all_rows @ seen.T)

    def explained(self, covariance: Covariance, seen: torch.Tensor | None = None) -> tuple[float, float]:
        """Predict the rows that are not observed by kriging without damping.

        Args:
            covariance: predicts.
            seen: int64, rows whose true drift is observed; None: the drift that the ``observed`` rows showed.

        Returns:
            Sums over the other rows: their drift times its prediction, and the squared prediction. A prediction times
            λ leaves ``variance - 2 λ first + λ² second`` of it.
        """
        observed = self.observed if seen is None else seen
        among, cross = (
            (self.observed_drift, self.cross) if seen is None else (self.drift[seen][:, seen], self.drift[:, seen])
        )
        others = self._others(observed)
        weights = _weights(covariance, observed, others)
        return float((weights * cross[others]).sum()), float((weights @ among * weights).sum())

    def variance(self, seen: torch.Tensor | None = None) -> float:
        """Variance of the rows that are not observed, summed."""
        return float(self.drift.diagonal()[self._others(self.observed if seen is None else seen)].sum())

    def _others(self, observed: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(self.drift), dtype=torch.bool).index_fill_(0, observed, False).nonzero().squeeze(1)


def _weights(covariance: Covariance, observed: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """How much of each observed row's drift goes into the prediction of each other row, (others, observed)."""
    among = covariance(observed, observed) + covariance.nugget(observed).diag()
    return torch.linalg.solve(among.double(), covariance(observed, others).double()).T.float()


@dataclass(frozen=True)
class Moments:
    """Covariances of drift in bins of offset and distance, each (bins,), over all given spans.

    Attributes:
        offset: mean offset of the first row of a pair.
        distance: mean distance of its second row from the first.
        covariance: mean covariance.
        pairs: number of pairs.
    """

    offset: torch.Tensor
    distance: torch.Tensor
    covariance: torch.Tensor
    pairs: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[SpanDrift]) -> Moments:
        bins = len(_EDGES) - 1
        sums = torch.zeros(4, bins * bins, dtype=torch.float64)
        for span in spans:
            first, second = torch.triu_indices(*span.drift.shape)
            distance = second - first
            cell = (torch.bucketize(first, _EDGES, right=True) - 1) * bins
            cell += torch.bucketize(distance, _EDGES, right=True) - 1
            for total, of_pair in zip(sums, (first, distance, span.drift[first, second]), strict=False):
                total += torch.bincount(cell, of_pair.double(), minlength=len(total))
            sums[3] += torch.bincount(cell, minlength=bins * bins)
        pairs = sums[3]
        found = pairs > 0
        offset, distance, covariance = (sums[:3, found] / pairs[found]).float()
        return cls(offset, distance, covariance, pairs[found])

    @property
    def unit(self) -> float:
        """Variance well inside a span, which is the unit of a :class:`~a3_sglang.drift.model.Covariance`."""
        inside = (self.distance == 0) & (self.offset >= _INSIDE[0]) & (self.offset < _INSIDE[1])
        return float(self.covariance[inside].mean())

    def variance(self, offset: torch.Tensor) -> torch.Tensor:
        """Measured variance at ``offset``, interpolated between the bins."""
        own = self.distance == 0
        known, variance = (1 + self.offset[own]).log(), self.covariance[own]
        at = (1 + offset.float()).log().clamp(known[0], known[-1])
        right = torch.searchsorted(known, at).clamp(1, len(known) - 1)
        share = (at - known[right - 1]) / (known[right] - known[right - 1])
        return variance[right - 1].lerp(variance[right], share)


def fit(spans: Sequence[SpanDrift]) -> Covariance:
    """The covariance with which the drift of these spans is predicted best.

    Its shape is a weighted least-squares fit of the variance by offset and the covariance by offset and distance
    (Cressie, "Fitting variogram models by weighted least squares", 1985): covariances are compared as correlations,
    and bins, whose width grows with offset and distance, count the same. Parameters that the data do not determine stay
    near those of :data:`~a3_sglang.drift.model.DEFAULT`. Its damping is :func:`fit_damping`.

    Args:
        spans: of keys or of values, at least one with 128 rows or more.

    Raises:
        ValueError: the spans are too short or do not drift.
    """
    if not any(len(span.drift) >= 128 for span in spans):
        raise ValueError("drift cannot be fitted: no reused span has 128 tokens or more")
    covariance = fit_shape(Moments.of(spans))
    return replace(covariance, damping=fit_damping(spans, covariance))


def fit_damping(spans: Sequence[SpanDrift], covariance: Covariance) -> float:
    """The damping that leaves least drift when the drift that recomputed rows showed predicts that of the others.

    Raises:
        ValueError: no recomputed row predicts anything.
    """
    gain, square = map(math.fsum, zip(*(span.explained(covariance) for span in spans), strict=True))
    if not square > 0:
        raise ValueError("drift cannot be fitted: no row that was recomputed drifts")
    return min(max(gain / square, 0.0), 1.0)


def fit_shape(moments: Moments) -> Covariance:
    """A covariance by weighted least squares, see :func:`fit`; its damping is that of ``DEFAULT``."""
    variances = moments.variance(moments.offset), moments.variance(moments.offset + moments.distance)
    scale = (variances[0] * variances[1]).sqrt()
    if not bool((scale > 0).all()):
        raise ValueError("drift cannot be fitted: some rows do not drift at all")
    start = _parameters(DEFAULT.keys)
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=300, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = (moments.unit * modelled(_covariance(parameters), moments) - moments.covariance) / scale
        total = error.square().mean() + _PRIOR * (parameters - start).square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    fitted = _covariance(parameters.detach())
    return Covariance(**{name: float(value) for name, value in vars(fitted).items()})


def modelled(covariance: Covariance, moments: Moments) -> torch.Tensor:
    """What a model says for each bin, (bins,), in its own unit."""
    first, second = moments.offset, moments.offset + moments.distance
    shared_and_local = covariance(first[:, None], second[:, None]).flatten()
    return shared_and_local + covariance.nugget(first).where(moments.distance == 0, 0)


def _parameters(covariance: Covariance) -> torch.Tensor:
    """Unbounded parameters of a covariance without its damping, float32 (8,)."""
    shared, local = (sill / (1 - MIN_NUGGET) for sill in (covariance.shared_sill, covariance.local_sill))
    sills, ranges = (shared, local, 1 - shared - local), (covariance.shared_range, covariance.local_range)
    positive = (*sills, *ranges, covariance.start_variance, covariance.variance_decay)
    floor = covariance.min_local_variance
    return torch.tensor([*map(math.log, positive), math.log(floor / (1 - floor))])


def _covariance(parameters: torch.Tensor) -> Covariance:
    """The covariance, whose fields are tensors; inverse of :func:`_parameters`."""
    shared, local, _ = (parameters[:3].softmax(0) * (1 - MIN_NUGGET)).unbind()
    shared_range, local_range, start, decay = parameters[3:7].exp().unbind()
    fields: dict[str, Any] = {
        "shared_sill": shared,
        "shared_range": shared_range,
        "local_sill": local,
        "local_range": local_range,
        "start_variance": start,
        "variance_decay": decay,
        "min_local_variance": parameters[7].sigmoid(),
        "damping": DEFAULT.keys.damping,
    }
    return Covariance(**fields)
