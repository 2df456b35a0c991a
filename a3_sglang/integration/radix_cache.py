"""The radix-cache backend ``a3``: SGLang's own tree that also reuses KV at any position of a prompt."""

from __future__ import annotations

from typing import Any

import torch

from a3_sglang.config import ServerOptions
from a3_sglang.fusion.executor import Executor
from a3_sglang.integration import compat
from a3_sglang.integration.planning import PlanningRadixCache
from a3_sglang.integration.prefill import FusedPrefill
from a3_sglang.integration.request_state import Admission, state_of
from a3_sglang.matching.plan import QUESTION_TOKENS
from a3_sglang.reporting.report import Reason
from a3_sglang.selectors.budget import max_ratio


class A3RadixCache(PlanningRadixCache):
    """Mixin in front of SGLang's tree class.

    A planned request gets private slots when it is admitted; :class:`FusedPrefill` fills them right before its extend
    runs. They are then inserted into the tree as all computed KV is, in a branch that only requests which allow fusion
    match (:mod:`a3_sglang.matching.branches`)::

        prompt    | prefix      | span | gap | span     | tail            |
        slots     | the tree's  | private to the request | extend's        |
        KV        | exact       | copied, partly         | computed        |
                  |             | recomputed or computed |                 |
        freed by  | the tree    | the tree once inserted; before that, A3RadixCache or SGLang's release |

    Attributes:
        prefill: runs the fusions; None until :meth:`start`.
        admitted: requests whose fusion has not run yet, keyed by identity, in order of admission.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.prefill: FusedPrefill | None = None
        self.admitted: dict[int, Any] = {}
        super().__init__(*args, **kwargs)

    def start(self, options: ServerOptions, executor: Executor, *, log_each: bool = False, **planning: Any) -> None:
        """Start to plan and to fuse.

        Args:
            options: of the server.
            executor: runs the fusions.
            log_each: log a line for every request.
            planning: see :meth:`PlanningRadixCache.start_planning`.
        """
        self.start_planning(options, chunk=executor.slice_rows, **planning)
        self.prefill = FusedPrefill(self, executor, log_each)

    def reset(self) -> None:
        super().reset()
        self.admitted.clear()

    # ---- admission

    def init_load_back(self, params: Any) -> Any:
        req = params.req
        match = state_of(req).match if req is not None else None
        if match is None or match.plan is None:
            return super().init_load_back(params)
        try:
            admission = self.reserve(req)
        except Exception:
            self.breaker.failed("admission")
            admission, match.reason = None, Reason.ERROR
        if admission is None:
            match.plan = match.next_pos = None
            no_slots = torch.empty(0, dtype=torch.int64, device=self.device)
            return compat.load_back_result(no_slots, req.last_node)
        self._admit(req, admission)
        return compat.load_back_result(admission.private_slots, req.last_node)

    def _admit(self, req: Any, admission: Admission) -> None:
        """Let a fusion run in the request's next step."""
        state_of(req).admissions.append(admission)
        self.admitted[id(req)] = req
        self.enter_branch(req)

    def after_admission(self, req: Any, admitted: bool) -> None:
        """Called after the scheduler has tried to admit a request.

        Its private slots are marked as not owned by the tree, or freed if it was not admitted.
        """
        match, pending = state_of(req).match, state_of(req).pending
        if not admitted:
            self.drop_admission(req)
        elif pending is not None and match.plan is not None:
            compat.set_protected_len(req, match.plan.prefix)

    def drop_admission(self, req: Any) -> None:
        """Free the private slots of a request that was admitted and has not run."""
        state = state_of(req)
        if state.pending is not None:
            self.token_to_kv_pool_allocator.free(state.pending.private_slots)
            state.admissions.pop()
        self.admitted.pop(id(req), None)

    def plan_next_step(self, req: Any, max_rows: int) -> None:
        """Plan a later step of a chunked prefill, and make what it reuses part of the request's prefix.

        Args:
            req: a request that has had a step.
            max_rows: rows that the step may compute between prefix and tail.
        """
        match = state_of(req).match
        match.plan = None
        prefix = compat.prefix_length(req)
        if match.next_pos is None or self.breaker.open or prefix % self.page_size:
            return
        if self.options.donors == "compiled" and prefix < match.next_pos - match.next_pos % self.page_size:
            # Other requests affect where a chunk of new text ends; they must not affect the plan.
            return
        admission = None
        try:
            self.plan_step(req, prefix, min(max_rows, self.max_rows()))
            if match.plan is not None:
                admission = self.reserve(req)
        except Exception:
            self.breaker.failed("admission")
            match.reason, match.next_pos = Reason.ERROR, None
        if admission is None:
            match.plan = None
            return
        self._admit(req, admission)
        compat.extend_prefix(self, req, admission.private_slots)
        if not self.options_of(req).keep:
            req.skip_radix_cache_insert = True

    def after_next_step(self, req: Any, admitted: bool) -> None:
        """Undo :meth:`plan_next_step` if the request gets no step now."""
        match = state_of(req).match
        if match.plan is not None and not admitted:
            compat.shorten_prefix(req, match.plan.prefix)
            self.drop_admission(req)
            match.plan = None

    def shrink_plan(self, req: Any, max_rows: int) -> None:
        """Plan a waiting request's first step again if it computes more than ``max_rows`` rows before its tail."""
        match = state_of(req).match
        if match.plan is not None and self.context_rows(req) > max_rows:
            self.plan_step(req, match.plan.prefix, max_rows)
            req.host_hit_length = self.planned_tokens(req)

    # ---- budgets

    def planned_tokens(self, req: Any) -> int:
        """Tokens between prefix and tail of a request's fusion; 0 if it is not fused."""
        plan = state_of(req).match.plan
        return plan.end - plan.prefix if plan is not None else 0

    def context_rows(self, req: Any) -> int:
        """Rows between prefix and tail that a request's fusion computes at most; 0 if it is not fused."""
        state = state_of(req)
        if state.match.plan is None or state.options is None:
            return 0
        return state.match.plan.rows(max_ratio(state.options.ratio))

    def fusion_rows(self, req: Any) -> int:
        """Rows that a request's fusion computes at most besides its tail, including the probe's; whole pages."""
        rows = self.context_rows(req)
        rows += QUESTION_TOKENS if rows else 0
        return rows + -rows % int(self.page_size)

    # ---- SGLang's protocol from 0.5.23 on

    def load_back_is_cache_owned(self) -> bool:
        return False

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        state = state_of(req)
        if state.pending is None or state.match.plan is None:
            return super().prefix_device_indices(req)
        path = self.path_device_indices(req.last_node)
        private_slots = state.pending.private_slots.to(path.dtype)
        return torch.cat([path[: state.match.plan.prefix], private_slots])[: req.prefix_len]
