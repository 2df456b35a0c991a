"""``--a3-mode observe``: SGLang's own tree serves all requests, and a shadow predicts what a3 would reuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from a3_sglang.config import REQUEST_KEY
from a3_sglang.integration import compat
from a3_sglang.integration.insert_tracker import InsertTracker
from a3_sglang.integration.request_state import RequestState
from a3_sglang.integration.shadow import Shadow
from a3_sglang.reporting.prefill_log import PrefillLog
from a3_sglang.reporting.report import Outcome, Reason


class ObservedRequest:
    """A view of a request for the shadow: attributes are read from the request, and written only to the view.

    Args:
        req: SGLang's request.
        limit: prompt tokens that may come from a cache.
    """

    def __init__(self, req: Any, limit: int) -> None:
        self._req, self.limit, self.prefix_len = req, limit, 0
        self.skip_radix_cache_insert = False
        self.a3 = RequestState()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._req, name)


class ObservingRadixCache(InsertTracker):
    """Mixin in front of SGLang's tree class that reports to a shadow and changes nothing the tree does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._shadow: Shadow | None = None
        super().__init__(*args, **kwargs)

    def observe(self, shadow: Shadow, log_each: bool) -> None:
        """Start to report to the shadow."""
        self._shadow, self._exact = shadow, shadow.tree.options.report == "exact"
        self._breaker, self._metrics = shadow.tree.breaker, shadow.tree.metrics
        self._log = PrefillLog(self._metrics, log_each, "A3 would reuse")

    def reset(self) -> None:
        super().reset()
        if self._shadow is not None:
            self._shadow.tree.reset()

    def match_prefix(self, params: Any) -> Any:
        result = super().match_prefix(params)
        req = getattr(params, "req", None)
        if req is not None and self._inserting is None and self._on and not hasattr(req, "a3_observed"):
            with self._guarded("search"):
                self._predict(req, len(params.key))
        return result

    def _predict(self, req: Any, limit: int) -> None:
        assert self._shadow is not None
        observed = ObservedRequest(req, limit)
        outcome: Outcome = self._shadow.ask(observed)
        req.a3_observed = observed
        compat.attach(req, REQUEST_KEY, {**outcome.report(self._exact), "mode": "observe"})
        self._log.completed([(req.rid, outcome)])
        if outcome.reason is not Reason.ERROR:
            self._breaker.succeeded()

    def insert(self, params: Any) -> Any:
        result = super().insert(params)
        observed = getattr(self._inserting, "a3_observed", None)
        if observed is not None and self._on:
            with self._guarded("indexing"):
                assert self._shadow is not None
                self._shadow.keep(observed, compat.key_tokens(params.key))
                self._metrics.indexed(*map(len, (self._shadow.tree.index, self._shadow.tree.approximate)))
        return result

    @property
    def _on(self) -> bool:
        return self._shadow is not None and not self._breaker.open

    @contextmanager
    def _guarded(self, stage: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._breaker.failed(stage)
