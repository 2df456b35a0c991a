"""SGLang's radix tree that plans what of a prompt can be reused at any position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from a3_sglang.config import ResolvedOptions, ServerOptions
from a3_sglang.integration import compat
from a3_sglang.integration.indexed_cache import IndexedRadixCache
from a3_sglang.integration.request_state import Admission, Progress, RequestState, ineligible, state_of
from a3_sglang.matching.branches import GENERATIONS, KINDS, Branch, generation_of
from a3_sglang.matching.plan import MIN_TAIL, QUESTION_TOKENS, Plan, first_step, make_plan
from a3_sglang.reporting.report import Outcome, Reason
from a3_sglang.selectors.budget import max_ratio, typical_ratio

_MAX_BRANCHES = 8
"""Branches that a prompt is matched with, at most."""


class PlanningRadixCache(IndexedRadixCache):
    """Mixin in front of SGLang's tree class: matches as the tree does, and plans what else of a prompt can be reused.

    What a plan reuses or computes before the tail is reported to the scheduler as KV that can be loaded
    (``host_hit_length``). No KV is read, so it also predicts reuse over a pool without KV
    (:mod:`a3_sglang.integration.shadow`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._debt = 0
        """Gap rows that fusions of the last generation have computed since the last renewal of donors."""
        super().__init__(*args, **kwargs)

    def start_planning(
        self, options: ServerOptions, capacity: int, chunk: int, overhead: int = 0, **indexing: Any
    ) -> None:
        """Start to index and to plan.

        Args:
            options: of the server.
            capacity: tokens that the KV pool holds.
            chunk: rows of a step.
            overhead: the cost of a fusion besides its own rows, in rows of a plain prefill.
            indexing: see :meth:`IndexedRadixCache.start_indexing`.
        """
        self.chunk, self._overhead = chunk, overhead
        self.start_indexing(options, capacity, **indexing)

    def clear_indexes(self) -> None:
        super().clear_indexes()
        self._debt = 0

    # ---- match

    def match_prefix(self, params: Any) -> Any:
        if self._inserting is not None:
            # Releases before 0.5.23 match what they have just inserted.
            return super().match_prefix(self.in_own_branch(params)[0])
        exact = super().match_prefix(params)
        req = getattr(params, "req", None)
        if req is None or self.index is None:
            return exact
        state = state_of(req)
        self.drop_admission(req)
        state.forget_match()
        if self.breaker.open:
            state.match.reason = Reason.DISABLED
            return exact
        try:
            result = self._match(req, state, params, exact)
        except Exception:
            self.breaker.failed("search")
            state.forget_match()
            state.match.reason, result = Reason.ERROR, exact
        if not self.options_of(req).keep:
            req.skip_radix_cache_insert = state.match.plan is not None
        return result

    def drop_admission(self, req: Any) -> None:
        """Called before a request is matched again: undo what its last match led to."""

    def _match(self, req: Any, state: RequestState, params: Any, exact: Any) -> Any:
        """Match the longest exact or approximate prefix, and plan what is reused after it."""
        options, match = self.options_of(req), state.match
        match.reason = ineligible(req, options)
        if match.reason is not None:
            return exact
        result = exact
        if options.keep:
            result, match.branch = self._match_branches(req, params, exact)
        match.limit = len(params.key)
        prefix = self.plan_step(req, compat.matched_length(result), self.max_rows())
        if match.reason is Reason.RENEWAL:
            return exact
        if prefix < compat.matched_length(result):
            result = super().match_prefix(replace(params, key=params.key[:prefix]))
        if match.plan is None:
            return result
        return result._replace(
            last_host_node=result.last_device_node,
            best_match_node=result.last_device_node,
            host_hit_length=match.plan.end - prefix,
        )

    def _match_branches(self, req: Any, params: Any, exact: Any) -> tuple[Any, Branch | None]:
        """The match with the branch that holds most of a prompt, if it holds notably more than the exact prefix."""
        best, found = exact, None
        longest = compat.matched_length(exact) + self.options.min_span - 1
        for branch in self.branches.find(self.hashes_of(req), _MAX_BRANCHES):
            if len(params.key) <= max(longest, branch.begin):
                continue
            result = super().match_prefix(replace(params, key=self.in_branch(params.key, branch)))
            if compat.matched_length(result) > max(longest, branch.begin):
                best, found, longest = result, branch, compat.matched_length(result)
        return best, found

    def enter_branch(self, req: Any) -> None:
        """Make the request's KV approximate from its plan on."""
        match = state_of(req).match
        if match.branch is None:
            assert match.plan is not None
            # With compiled donors, what others ask about the same text must not matter.
            common = self.hashes_of(req)[-1 if self.options.donors == "compiled" else 0]
            match.branch = Branch(match.plan.prefix, match.generation, int(common) % KINDS)

    @staticmethod
    def settle(req: Any, plan: Plan, recomputed: int) -> None:
        """Make the request's KV exact again if every reused token after an exact prefix was recomputed."""
        match = state_of(req).match
        if recomputed == plan.reused and match.branch is not None and match.branch.begin == plan.prefix:
            match.branch = None

    # ---- plan

    def plan_step(self, req: Any, prefix: int, max_rows: int) -> int:
        """Plan what the next step of a prefill reuses: the ``plan`` and ``next_pos`` of the request's match.

        Args:
            req: the request.
            prefix: prompt tokens whose KV exists.
            max_rows: rows that the step may compute between prefix and tail.

        Returns:
            Tokens of the prefix that the step uses.
        """
        options, match = self.options_of(req), state_of(req).match
        match.plan = match.next_pos = None
        plan = self._plan_prompt(req, prefix)
        if plan is None:
            return prefix
        if match.branch is None:
            match.generation = 1 + max(generation_of(span.segment.mark) for span in plan.spans)
            if match.generation >= GENERATIONS and self._renewal_pays(req, plan):
                match.reason = Reason.RENEWAL
                return prefix
        match.plan, match.next_pos = first_step(
            plan, max_ratio(options.ratio), max_rows, self.page_size, options.min_span
        )
        return plan.prefix

    def _plan_prompt(self, req: Any, prefix: int, end: int | None = None) -> Plan | None:
        """What of the whole prompt can be reused; None, with the reason in the match, if fusion does not pay.

        Args:
            req: the request.
            prefix: prompt tokens whose KV exists.
            end: position at which the tail has to start, if that is fixed already.
        """
        assert self.index is not None
        state, options, prompt = state_of(req), self.options_of(req), len(req.origin_input_ids)
        match, cached = state.match, prefix
        if self.options.donors == "compiled" and match.branch is None and state.progress is None:
            # Any other KV that the tree holds of the prompt would make the answer depend on other requests.
            tokens = np.array(req.origin_input_ids[: match.limit], dtype=np.int64)
            prefix = min(prefix, self.index.known_prefix(self.namespace_of(req), tokens))
        plan = make_plan(self.find_spans(req, prefix), prefix, prompt, match.limit, self.page_size, end)
        match.reusable = plan.reused if plan else 0
        if plan is None:
            match.reason = None if match.branch is not None else Reason.NOTHING
        elif end is None and not self._pays(plan, prompt, cached, options):
            match.reason, plan = Reason.TOO_LITTLE, None
        return plan

    def _pays(self, plan: Plan, prompt: int, cached: int, options: ResolvedOptions) -> bool:
        """Whether a fusion saves enough of the rows that a plain prefill after the cached prefix would compute."""
        if not options.min_saving:
            return True
        tail = prompt - plan.end
        rows = plan.rows(typical_ratio(options.ratio)) + tail + min(QUESTION_TOKENS, plan.gap + tail)
        return rows + self._overhead <= (1 - options.min_saving) * (prompt - cached)

    def _renewal_pays(self, req: Any, plan: Plan) -> bool:
        """Whether new text in fusions of the last generation has cost as many rows as a fusion of this plan saves.

        KV of the last generation is never a donor, so its new text is computed again for every prompt. A full prefill
        makes the whole prompt an exact donor. This is ski rental: never more than twice the cost of an offline optimum.
        """
        saved = plan.reused + plan.gap - plan.rows(typical_ratio(self.options_of(req).ratio))
        return plan.gap >= self.options.min_span and self._debt + plan.gap >= saved

    def ratio_of(self, plan: Plan, nominal: float) -> float:
        """The share of a plan's reused tokens to recompute; see :meth:`Plan.ratio`."""
        assert self.index is not None
        return plan.ratio(nominal, self.index.block)

    def max_rows(self) -> int:
        """Rows that a fusion may compute, so that its step computes no more than a step of SGLang does."""
        return self.rows_within(self.chunk)

    def rows_within(self, chunk: int) -> int:
        """Rows between prefix and tail that fit into a step of ``chunk`` rows."""
        return chunk - QUESTION_TOKENS - MIN_TAIL - int(self.page_size)

    def tail_limit(self, req: Any) -> int | None:
        """Tokens that a request's next step may compute after its plan, before reuse resumes; None: no limit."""
        match, page_size = state_of(req).match, int(self.page_size)
        if match.next_pos is None:
            return None
        begin = match.plan.end if match.plan is not None else compat.prefix_length(req)
        return max((match.next_pos - begin) // page_size, 1) * page_size

    # ---- slots

    def reserve(self, req: Any) -> Admission | None:
        """Allocate private slots for a plan and look up its donors' slots; None, with a reason, if that fails.

        Nothing is copied yet. The device may still run earlier requests that write this one's donors, or that use
        the slots that were freed and are now private. Only the request's own forward is ordered after them.
        """
        match, locks = state_of(req).match, list[Callable[[], None]]()
        try:
            for _ in range(2):
                assert match.plan is not None
                sources = self.donor_slots(match.plan, locks)
                if sources is not None:
                    break
                # A donor was evicted since the match. Other donors may hold the same text; the tail starts as planned.
                plan = self._plan_prompt(req, match.plan.prefix, match.plan.end)
                if plan is None or plan.prefix != match.plan.prefix:
                    break
                match.plan = plan
            if sources is None:
                match.reason = Reason.EVICTED
                return None
            assert match.plan is not None
            private_slots = compat.allocate(self, match.plan.end - match.plan.prefix)
            if private_slots is None:
                match.reason = Reason.NO_ROOM
                return None
            return Admission(private_slots, torch.cat(sources).to(torch.int64))
        finally:
            # It is safe to unlock: whatever overwrites an evicted donor is queued after our copy on the same stream.
            for unlock in locks:
                unlock()

    # ---- progress and outcome

    def start_progress(self, req: Any) -> None:
        """Note what the first step of a prefill found in the tree."""
        state = state_of(req)
        if state.progress is not None:
            return
        plan = state.match.plan
        prefix = plan.prefix if plan is not None else compat.prefix_length(req)
        state.progress = Progress(min(prefix, len(req.origin_input_ids)))
        if state.match.reason is Reason.RENEWAL:
            self._debt = 0

    def add_fusion(self, req: Any, plan: Plan, recomputed: int, charged: float) -> None:
        """Add a fusion to the progress of a request's prefill.

        Args:
            req: the request.
            plan: of the fusion.
            recomputed: reused tokens that were recomputed.
            charged: see :class:`a3_sglang.reporting.report.Outcome`.
        """
        state = state_of(req)
        progress, branch = state.progress, state.match.branch
        assert progress is not None
        progress.reused += plan.reused - recomputed
        progress.recomputed += recomputed
        progress.gap += plan.gap
        progress.charged += charged * (plan.end - plan.prefix)
        if branch is not None and branch.generation >= GENERATIONS:
            self._debt += plan.gap

    def outcome(self, req: Any) -> Outcome:
        """How the KV of the request's prompt has been obtained so far."""
        state, prompt = state_of(req), len(req.origin_input_ids)
        progress, match = state.progress, state.match
        assert progress is not None
        continued = max(progress.prefix - match.branch.begin, 0) if match.branch is not None else 0
        counts = (progress.prefix - continued, continued, progress.reused, progress.recomputed, progress.gap)
        reason = match.reason
        if progress.fused and reason is not Reason.ERROR:
            reason = None
        elif not progress.fused and match.branch is None:
            reason = reason or Reason.NOTHING
        return Outcome(
            (*counts, prompt - sum(counts)),
            progress.charged / progress.fused if progress.fused else 0.0,
            state.options.selector if state.options is not None else self.options.selector,
            reason,
            match.reusable,
        )
