"""The radix-cache backend ``a3``: SGLang's own tree that also offers spans."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from a3_sglang.attention.row_attention import RequestRows
from a3_sglang.config import REQUEST_KEY, ServerOptions
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.integration import compat
from a3_sglang.integration.planning import PlanningRadixCache, most
from a3_sglang.integration.request import Reason, RequestState, state_of
from a3_sglang.matching.plan import QUESTION_TOKENS
from a3_sglang.reporting.account import PrefillLog
from a3_sglang.reporting.detail import make_detail
from a3_sglang.reporting.report import Outcome
from a3_sglang.selectors import make_selector
from a3_sglang.timing import Timings

logger = logging.getLogger(__name__)

_TIMED = os.environ.get("A3_TIMINGS") == "1"
"""Whether requests report how long the parts of their fusion took."""


class A3RadixCache(PlanningRadixCache):
    """Mixin in front of SGLang's tree class.

    Slots for what is planned are allocated when a request is admitted and filled right before it runs. Then they go
    into the tree like any computed KV, in a branch that only requests which allow fusion match
    (:mod:`a3_sglang.matching.branches`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.executor: Executor | None = None
        self.waiting: dict[int, Any] = {}
        """Admitted requests whose fusion has not run, by identity, in order of admission."""
        super().__init__(*args, **kwargs)

    def start(self, options: ServerOptions, executor: Executor, *, log_each: bool = False, **planning: Any) -> None:
        """Begin to offer spans.

        Args:
            options: the server's.
            executor: runs the fusions.
            log_each: whether the log has a line for every request.
            planning: see :meth:`PlanningRadixCache.start_planning`.
        """
        self.executor = executor
        self.start_planning(options, chunk=executor.slice_rows, **planning)
        self.account = PrefillLog(self.metrics, log_each)

    def reset(self) -> None:
        super().reset()
        self.waiting.clear()

    # ---- admission

    def forget(self, req: Any) -> None:
        self._drop_unused(req, state_of(req))

    def init_load_back(self, params: Any) -> Any:
        req = params.req
        state = state_of(req) if req is not None else None
        if state is None or state.plan is None:
            return super().init_load_back(params)  # type: ignore[misc]
        try:
            slots = self.obtain(req, state)
        except Exception:
            self.breaker.failed("admission")
            slots, state.reason = None, Reason.ERROR
        if slots is None:
            state.plan = state.stop = None
            return compat.loaded(torch.empty(0, dtype=torch.int64, device=self.device), req.last_node)  # type: ignore[attr-defined]
        self._admit(req, state, slots)
        return compat.loaded(slots, req.last_node)

    def _admit(self, req: Any, state: RequestState, slots: torch.Tensor) -> None:
        """A fusion will run in the request's next step, into these slots."""
        state.private, state.waiting = slots, True
        self.waiting[id(req)] = req
        self.enter_branch(req, state)

    def after_admission(self, req: Any, admitted: bool) -> None:
        """Slots for a fusion stay the request's own until they are inserted, whatever the admission made of them."""
        state = state_of(req)
        if not admitted:
            self._drop_unused(req, state)
        elif state.waiting and state.plan is not None:
            compat.protect(req, state.plan.prefix)

    def _drop_unused(self, req: Any, state: RequestState) -> None:
        """Slots of an admission that came to nothing go back."""
        if state.waiting:
            self.token_to_kv_pool_allocator.free(state.private)  # type: ignore[attr-defined]
            state.waiting, state.private = False, None
        self.waiting.pop(id(req), None)

    def plan_next(self, req: Any, most_rows: int) -> None:
        """Plan the next step of a chunked prefill, and count what it reuses as the request's prefix.

        Args:
            req: a request that has had a step.
            most_rows: rows that this one may compute.
        """
        state, page_size = state_of(req), self.page_size  # type: ignore[attr-defined]
        state.plan = None
        prefix = compat.prefix_length(req)
        if state.stop is None or self.breaker.open or prefix % page_size:
            return
        if self.options.donors == "compiled" and prefix < state.stop - state.stop % page_size:
            # Other requests affect where a chunk of new text ends; they must not affect the plan.
            return
        slots = None
        try:
            self.plan_step(req, state, prefix, min(most_rows, self.most_rows()))
            if state.plan is not None:
                slots = self.obtain(req, state)
        except Exception:
            self.breaker.failed("admission")
            state.reason, state.stop = Reason.ERROR, None
        if slots is None:
            state.plan = None
            return
        self._admit(req, state, slots)
        compat.extend_prefix(self, req, slots)
        if not self.options_of(req).keep:
            req.skip_radix_cache_insert = True

    def after_next(self, req: Any, admitted: bool) -> None:
        """Take back :meth:`plan_next` if the request has no step now."""
        state = state_of(req)
        if state.plan is not None and not admitted:
            compat.shorten_prefix(req, state.plan.prefix)
            self._drop_unused(req, state)
            state.plan = None

    def fit(self, req: Any, most_rows: int) -> None:
        """Plan a waiting request's first step again, with fewer rows."""
        state = state_of(req)
        if state.plan is not None and self.context_rows_of(req) > most_rows:
            self.plan_step(req, state, state.plan.prefix, most_rows)
            req.host_hit_length = self.planned_of(req)

    def planned_of(self, req: Any) -> int:
        """Tokens between prefix and tail of a request's fusion; 0 if it is not fused."""
        plan = state_of(req).plan
        return plan.end - plan.prefix if plan is not None else 0

    def context_rows_of(self, req: Any) -> int:
        """Rows between prefix and tail that a request's fusion computes, at most; 0 if it is not fused."""
        state = state_of(req)
        if state.plan is None or state.options is None:
            return 0
        return state.plan.rows(most(state.options.ratio))

    def rows_of(self, req: Any) -> int:
        """Rows that a request's fusion computes besides its tail, the probe's among them, at most; whole pages."""
        rows = self.context_rows_of(req)
        rows += QUESTION_TOKENS if rows else 0
        return rows + -rows % self.page_size  # type: ignore[attr-defined]

    def load_back_is_cache_owned(self) -> bool:
        return False

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        state = state_of(req)
        if not state.waiting or state.private is None or state.plan is None:
            return super().prefix_device_indices(req)  # type: ignore[misc]
        path = self.path_device_indices(req.last_node)  # type: ignore[attr-defined]
        return torch.cat([path[: state.plan.prefix], state.private.to(path.dtype)])[: req.prefix_len]

    # ---- fusion

    def forward(self, batch: Any, run: Callable[[], Any]) -> Any:
        """Run an extend batch, with the fusion of its newly admitted requests, and write all new reports.

        An error in the fusion costs no request its answer: whatever was to be reused is recomputed, request by
        request, and the batch runs as in stock SGLang. A request for which that fails too is aborted alone.

        Args:
            batch: the ScheduleBatch.
            run: runs it as SGLang does.

        Returns:
            What ``run`` returned.
        """
        fused = [req for req in batch.reqs if state_of(req).branch is not None]
        mine = {id(req) for req in batch.reqs}
        # By order of admission: what one request's donors gave up may be another's by now.
        admitted = [req for key, req in self.waiting.items() if key in mine]
        jobs: dict[int, FusionRequest] = {}
        if not fused:
            result = run()
        else:
            timed = _TIMED or self.metrics.on or any(self.options_of(req).explain for req in admitted)
            timings = Timings(self.device if timed else None)  # type: ignore[attr-defined]
            try:
                for req in admitted:
                    jobs[id(req)] = self._job(req)
                result = self._run_fused(batch, [(req, jobs[id(req)]) for req in admitted], timings, run)
            except Exception:
                self.breaker.failed(timings.part)
                self._recompute_everything(admitted, jobs)
                result = run()
            else:
                if admitted:
                    self.breaker.succeeded()
                    if self.metrics.on:
                        self.account.timed(timings)
        for req in batch.reqs:
            self.begin(req)
        for req in admitted:
            self._finish_fusion(req, jobs.get(id(req)), timings)
        self._report(batch)
        if fused and _TIMED:
            taken = timings.milliseconds()
            for req in fused:
                compat.attach(req, "a3_ms", taken)
        for req in list(self.waiting.values()):
            self._drop_unused(req, state_of(req))
        return result

    def _run_fused(
        self, batch: Any, admitted: list[tuple[Any, FusionRequest]], timings: Timings, run: Callable[[], Any]
    ) -> Any:
        """Fuse the admitted requests and run the batch, which may include their last rows to recompute.

        On a CPU rows always attend as the fusion does, as SGLang's own attention would compute every prefix again;
        elsewhere only if all requests of the batch are fused, as the others keep SGLang's attention.
        """
        assert self.executor is not None
        on_cpu = self.device.type == "cpu"  # type: ignore[attr-defined]
        jobs = [job for _, job in admitted]
        for req, job in admitted:
            sources = state_of(req).sources
            assert sources is not None
            with timings.add("copy"):
                self.executor.copy(job, sources)
        left = []
        if jobs:
            one_pass = on_cpu or all(state_of(req).branch is not None for req in batch.reqs)
            room = max(0, self.executor.slice_rows - sum(batch.extend_lens)) if one_pass else 0
            self.executor.select(jobs, timings)
            left = self.executor.recompute(jobs, timings, room)
        for req, job in admitted:
            self.settle(state_of(req), job.plan, len(job.recomputed_pos))
        with timings.add("recompute" if left else "tail"):
            if not left and not on_cpu:
                return run()
            with self.executor.with_leftover(left, self._groups(batch), batch.out_cache_loc.to(torch.int64)):
                return run()

    def _recompute_everything(self, admitted: list[Any], jobs: dict[int, FusionRequest]) -> None:
        """Compute the KV between prefix and tail of each request in full, after an error in the fusion."""
        assert self.executor is not None
        for req in admitted:
            state = state_of(req)
            state.reason = Reason.ERROR
            try:
                job = jobs[id(req)] = self._job(req)
                job.select_all()
                self.executor.recompute([job], Timings())
                self.settle(state_of(req), job.plan, len(job.recomputed_pos))
            except Exception:
                self.breaker.failed("full recompute")
                self._abort(req)

    def _abort(self, req: Any) -> None:
        """End a request whose KV cannot be made; its slots hold nothing, so that its last forward stays finite."""
        assert self.executor is not None
        private = state_of(req).private
        with suppress(Exception):
            for pool in (*self.executor.model.keys, *self.executor.model.values):
                pool[private] = 0
        compat.abort(req, "a3: the prompt's KV could not be computed; the server's log has the error")

    def _finish_fusion(self, req: Any, job: FusionRequest | None, timings: Timings) -> None:
        state = state_of(req)
        state.waiting = False
        state.recomputed = job.recomputed_pos if job is not None else None
        self.waiting.pop(id(req), None)
        if job is not None:
            assert self.executor is not None
            compat.count_as_computed(req, len(job.recomputed_pos) + job.plan.gap)
            self.count(req, job.plan, len(job.recomputed_pos), job.charged(self.executor.model.depth))
            if self.options_of(req).explain:
                state.explained.append((job, timings))

    def _groups(self, batch: Any) -> list[RequestRows]:
        """The rows of a batch's extend."""
        groups, begin = [], 0
        for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            slots = compat.row(self, req)[: prefix + length].to(torch.int64)
            visible = torch.arange(prefix, prefix + length, device=slots.device) + 1
            groups.append(RequestRows(begin, begin + length, slots, visible, state_of(req).branch is None))
            begin += length
        return groups

    def _job(self, req: Any) -> FusionRequest:
        state = state_of(req)
        plan, options = state.plan, state.options
        assert plan is not None
        assert options is not None
        assert state.private is not None
        slots = torch.cat([compat.row(self, req)[: plan.prefix].to(torch.int64), state.private.to(torch.int64)])
        tokens = torch.from_numpy(np.asarray(req.origin_input_ids, dtype=np.int64))
        if tokens.device != slots.device:
            # From memory that is not pinned the copy would wait for all that the device has to do.
            tokens = tokens.pin_memory().to(slots.device, non_blocking=True)
        ratio = options.ratio if options.ratio == "auto" else self.ratio_of(plan, options.ratio)
        return FusionRequest(plan, tokens, slots, make_selector(options.selector), ratio, options.question)

    def _report(self, batch: Any) -> None:
        """Write the reports of prompts that are not complete yet, and account for those that this batch completes."""
        assert self.index is not None
        assert self.approximate is not None
        ended = []
        for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            state = state_of(req)
            assert state.done is not None
            if state.done.complete:
                continue  # It decodes.
            outcome = self.outcome(req)
            state.done.complete = prefix + length >= len(req.origin_input_ids)
            report = outcome.report(exact=self.options.report == "exact")
            if state.done.complete and self.options_of(req).explain:
                report["detail"] = self._detail(state, outcome)
            compat.attach(req, REQUEST_KEY, report)
            if state.done.complete and not state.accounted:
                state.accounted = True
                ended.append((req.rid, outcome))
        self.account.prefilled(ended)
        self.metrics.indexed(len(self.index), len(self.approximate))

    @staticmethod
    def _detail(state: RequestState, outcome: Outcome) -> dict[str, Any] | None:
        """Where each token came from; None after an error, which must not cost the answer."""
        fusions, state.explained = state.explained, []
        try:
            return make_detail(outcome, fusions)
        except Exception:
            logger.exception("a3: the detail of a report failed")
            return None
