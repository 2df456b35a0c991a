"""Runs a batch's extend together with the fusions of its newly admitted requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from a3_sglang.attention.base import RequestRows
from a3_sglang.config import REQUEST_KEY
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.request import FusionRequest, Slice
from a3_sglang.integration import compat
from a3_sglang.integration.request_state import RequestState, state_of
from a3_sglang.reporting.detail import make_detail
from a3_sglang.reporting.prefill_log import PrefillLog
from a3_sglang.reporting.report import TIMINGS_KEY, Outcome, Reason
from a3_sglang.selectors import make_selector
from a3_sglang.timing import Timings

if TYPE_CHECKING:
    from a3_sglang.integration.radix_cache import A3RadixCache

logger = logging.getLogger(__name__)

_TIMED = os.environ.get("A3_TIMINGS") == "1"
"""Whether each request's ``meta_info`` has the times of the stages of its fusion."""


class FusedPrefill:
    """Runs the fusions of the requests that the cache has admitted.

    Args:
        cache: of the scheduler's process.
        executor: runs the fusions.
        log_each: log a line for every request.
    """

    def __init__(self, cache: A3RadixCache, executor: Executor, log_each: bool) -> None:
        self.executor = executor
        self._cache, self._log = cache, PrefillLog(cache.metrics, log_each)

    def forward(self, batch: Any, run: Callable[[], Any]) -> Any:
        """Run an extend batch with the fusions of its newly admitted requests, and write the requests' reports.

        After an error in a fusion, everything that was to be reused is recomputed, request by request, and the batch
        runs as in stock SGLang. Only a request for which that fails too is aborted.

        Args:
            batch: SGLang's ScheduleBatch.
            run: runs the batch in stock SGLang.

        Returns:
            The result of ``run``.
        """
        cache = self._cache
        approximate = [req for req in batch.reqs if state_of(req).match.branch is not None]
        # In admission order: slots of a request's evicted donors may already be a later request's private slots.
        in_batch = {id(req) for req in batch.reqs}
        admitted = [req for key, req in cache.admitted.items() if key in in_batch]
        fusions: dict[int, FusionRequest] = {}
        if not approximate:
            result = run()
        else:
            timed = _TIMED or cache.metrics.on or any(cache.options_of(req).explain for req in admitted)
            timings = Timings(cache.device if timed else None)
            try:
                for req in admitted:
                    fusions[id(req)] = self._fusion_of(req)
                result = self._run_fused(batch, [(req, fusions[id(req)]) for req in admitted], timings, run)
            except Exception:
                cache.breaker.failed(timings.part)
                self._recompute_everything(admitted, fusions)
                result = run()
            else:
                if admitted:
                    cache.breaker.succeeded()
                    if cache.metrics.on:
                        self._log.timed(timings)
        for req in batch.reqs:
            cache.start_progress(req)
        for req in admitted:
            self._finish(req, fusions.get(id(req)), timings)
        self._report(batch)
        if approximate and _TIMED:
            milliseconds = timings.milliseconds()
            for req in approximate:
                compat.attach(req, TIMINGS_KEY, milliseconds)
        for req in list(cache.admitted.values()):
            cache.drop_admission(req)
        return result

    def _fusion_of(self, req: Any) -> FusionRequest:
        state = state_of(req)
        plan, options, admission = state.match.plan, state.options, state.admission
        assert plan is not None
        assert options is not None
        assert admission is not None
        prefix_slots = compat.slots_of(self._cache, req)[: plan.prefix]
        slots = torch.cat([prefix_slots.to(torch.int64), admission.private_slots.to(torch.int64)])
        tokens = torch.from_numpy(np.asarray(req.origin_input_ids, dtype=np.int64))
        if tokens.device != slots.device:
            # A copy from pageable memory would block until the GPU's queue drains.
            tokens = tokens.pin_memory().to(slots.device, non_blocking=True)
        ratio = options.ratio if options.ratio == "auto" else self._cache.ratio_of(plan, options.ratio)
        return FusionRequest(plan, tokens, slots, make_selector(options.selector), ratio, options.question)

    def _run_fused(
        self, batch: Any, admitted: Sequence[tuple[Any, FusionRequest]], timings: Timings, run: Callable[[], Any]
    ) -> Any:
        """Fuse the admitted requests and run the batch, whose forward may take the last rows to recompute.

        On a CPU the batch always attends as the fusions do, since SGLang's own attention would compute every prefix
        again. On a GPU it does so only if all its requests have approximate KV; otherwise SGLang's attention runs.
        """
        on_cpu = self._cache.device.type == "cpu"
        fusions = [fusion for _, fusion in admitted]
        for req, fusion in admitted:
            admission = state_of(req).admission
            assert admission is not None
            with timings.add("copy"):
                self.executor.copy(fusion, admission.donor_slots)
        leftover: list[Slice] = []
        if fusions:
            one_pass = on_cpu or all(state_of(req).match.branch is not None for req in batch.reqs)
            room = max(0, self.executor.slice_rows - sum(batch.extend_lens)) if one_pass else 0
            self.executor.select(fusions, timings)
            leftover = self.executor.recompute(fusions, timings, room)
        for req, fusion in admitted:
            self._cache.settle(req, fusion.plan, len(fusion.recomputed_pos))
        with timings.add("recompute" if leftover else "tail"):
            if not leftover and not on_cpu:
                return run()
            with self.executor.with_leftover(leftover, self._rows_of(batch), batch.out_cache_loc.to(torch.int64)):
                return run()

    def _rows_of(self, batch: Any) -> list[RequestRows]:
        """The rows of a batch's extend."""
        requests, begin_row = [], 0
        for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            slots = compat.slots_of(self._cache, req)[: prefix + length].to(torch.int64)
            kv_lens = torch.arange(prefix, prefix + length, device=slots.device) + 1
            exact = state_of(req).match.branch is None
            requests.append(RequestRows(begin_row, begin_row + length, slots, kv_lens, exact))
            begin_row += length
        return requests

    def _recompute_everything(self, admitted: Sequence[Any], fusions: dict[int, FusionRequest]) -> None:
        """Compute the KV between prefix and tail of each request in full, after an error in a fusion."""
        for req in admitted:
            state_of(req).match.reason = Reason.ERROR
            try:
                fusion = fusions[id(req)] = self._fusion_of(req)
                fusion.select_all()
                self.executor.recompute([fusion], Timings())
                self._cache.settle(req, fusion.plan, len(fusion.recomputed_pos))
            except Exception:
                self._cache.breaker.failed("full recompute")
                self._abort(req)

    def _abort(self, req: Any) -> None:
        """End a request whose KV cannot be computed; zeros in its slots keep its last forward finite."""
        admission = state_of(req).admission
        with suppress(Exception):
            assert admission is not None
            for pool in (*self.executor.model.keys, *self.executor.model.values):
                pool[admission.private_slots] = 0
        compat.abort(req, "a3: the prompt's KV could not be computed; the server's log has the error")

    def _finish(self, req: Any, fusion: FusionRequest | None, timings: Timings) -> None:
        """Note what a fusion has done."""
        state = state_of(req)
        if state.admission is not None:
            state.admission.pending = False
            state.admission.recomputed_pos = fusion.recomputed_pos if fusion is not None else None
        self._cache.admitted.pop(id(req), None)
        if fusion is None:
            return
        compat.count_as_computed(req, len(fusion.recomputed_pos) + fusion.plan.gap)
        charged = fusion.charged(self.executor.model.depth)
        self._cache.add_fusion(req, fusion.plan, len(fusion.recomputed_pos), charged)
        if self._cache.options_of(req).explain:
            state.fusions.append((fusion, timings))

    def _report(self, batch: Any) -> None:
        """Attach reports to requests whose prompt was not complete before this batch, and log those it completes."""
        cache, completed = self._cache, []
        for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            state = state_of(req)
            assert state.progress is not None
            if state.progress.complete:
                continue  # It decodes.
            outcome = cache.outcome(req)
            state.progress.complete = prefix + length >= len(req.origin_input_ids)
            report = outcome.report(exact=cache.options.report == "exact")
            if state.progress.complete and cache.options_of(req).explain:
                report["detail"] = _detail(state, outcome)
            compat.attach(req, REQUEST_KEY, report)
            if state.progress.complete and not state.logged:
                state.logged = True
                completed.append((req.rid, outcome))
        self._log.completed(completed)
        assert cache.index is not None
        assert cache.approximate is not None
        cache.metrics.indexed(len(cache.index), len(cache.approximate))


def _detail(state: RequestState, outcome: Outcome) -> dict[str, Any] | None:
    """The source of each token; None after an error, which must not cost the answer."""
    fusions, state.fusions = state.fusions, []
    try:
        return make_detail(outcome, fusions)
    except Exception:
        logger.exception("a3: the detail of a report failed")
        return None
