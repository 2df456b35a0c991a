"""SGLang's own tree with what is needed to plan reuse at any position: indexes, branches, plans."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from a3_sglang.config import ResolvedOptions, ServerOptions, resolve_or_disable
from a3_sglang.integration import compat
from a3_sglang.integration.breaker import CircuitBreaker
from a3_sglang.integration.inserting import InsertTracker
from a3_sglang.integration.request import Done, Reason, RequestState, ineligible, state_of
from a3_sglang.matching.branches import GENERATIONS, KINDS, Branch, Branches, prefix_hashes
from a3_sglang.matching.index import AnyPositionIndex, Run, Segment, beside
from a3_sglang.matching.plan import MIN_TAIL, QUESTION_TOKENS, Plan, first_step, make_plan
from a3_sglang.reporting.metrics import Metrics
from a3_sglang.reporting.report import Outcome
from a3_sglang.selectors.budget import AUTO_CAP, AUTO_USUAL, Ratio

_BRANCHES_TRIED = 8
"""Branches whose tokens are compared with a prompt's, at most."""


class PlanningRadixCache(InsertTracker):
    """Mixin in front of SGLang's tree class: matches as the tree does and plans what else of a prompt can be reused.

    What is in a plan is offered as obtainable (``host_hit_length``). It needs no KV, so it also tells what *would* be
    reused (:mod:`a3_sglang.integration.shadow`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.index: AnyPositionIndex | None = None
        """Donors with exact KV."""
        self.approximate: AnyPositionIndex | None = None
        """Donors with approximate KV, marked with their :class:`Branch`."""
        self.branches = Branches()
        self._debt = 0
        """Rows of gaps that fusions of the last generation computed since the last renewal."""
        super().__init__(*args, **kwargs)

    def start_planning(
        self,
        options: ServerOptions,
        capacity: int,
        chunk: int,
        overhead: int = 0,
        metrics: Metrics | None = None,
        line_ends: Any = None,
    ) -> None:
        """Begin to plan.

        Args:
            options: the server's.
            capacity: tokens the KV pool holds.
            chunk: rows of a step.
            overhead: rows that take as long to compute as what a fusion costs besides its own rows.
            metrics: where failures are counted.
            line_ends: bool (vocabulary,), the tokens that end a line; None if that is not known.
        """
        self.options, self.chunk, self._overhead = options, chunk, overhead
        self.metrics = metrics or Metrics(None)
        self.breaker = CircuitBreaker(self.metrics.failed, self.metrics.turned_off)
        self.index, self.approximate = (
            AnyPositionIndex(
                options.min_span,
                capacity=2 * capacity,
                page_size=self.page_size,  # type: ignore[attr-defined]
                line_ends=line_ends,
            )
            for _ in range(2)
        )

    def insert(self, params: Any) -> Any:
        params, branch = self._as_inserted(params)
        result = super().insert(params)  # type: ignore[misc]
        if self.index is not None and not self.breaker.open:
            try:
                self._donate(params.key, branch)
            except Exception:
                self.breaker.failed("indexing")
                self._clear_indexes()
        return result

    def _as_inserted(self, params: Any) -> tuple[Any, Branch | None]:
        """Parameters with the key in the branch of the request whose KV is being inserted, and that branch."""
        branch = state_of(self._inserting).branch if self._inserting is not None else None
        if branch is not None:
            params = replace(params, key=self._in_branch(params.key, branch))
        return params, branch

    def _donate(self, key: Any, branch: Branch | None) -> None:
        """Register what was inserted as a donor, and its branch if it has one."""
        assert self.index is not None
        assert self.approximate is not None
        space, req = compat.namespace(key), self._inserting
        if branch is None:
            self.index.add(space, compat.key_tokens(key)[: self._donated()])
            return
        if len(key) <= branch.begin:
            return
        compiled = self.options.donors == "compiled"
        self.branches.add(self._hashes(req), len(req.origin_input_ids) if compiled else branch.begin, branch)
        if not compiled and branch.generation < GENERATIONS:
            self.approximate.add(space, branch.tokens(compat.key_tokens(key)), branch)

    def _donated(self) -> int | None:
        """How many tokens of what is being inserted may be reused elsewhere; None for all."""
        if self.options.donors == "harvest":
            return None
        req = self._inserting
        # The answer to a donor is no donor.
        return len(req.origin_input_ids) if req is not None and self.options_of(req).donor else 0

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._clear_indexes()

    def _clear_indexes(self) -> None:
        for index in (self.index, self.approximate, self.branches):
            if index is not None:
                index.clear()
        self._debt = 0

    # ---- match and plan

    def match_prefix(self, params: Any) -> Any:
        if self._inserting is not None:
            # Releases before 0.5.23 look up what they have inserted.
            return super().match_prefix(self._as_inserted(params)[0])  # type: ignore[misc]
        exact = super().match_prefix(params)  # type: ignore[misc]
        req = getattr(params, "req", None)
        if req is None or self.index is None:
            return exact
        state = state_of(req)
        self.forget(req)
        state.renew()
        if self.breaker.open:
            state.reason = Reason.DISABLED
            return exact
        try:
            result = self._match(req, state, params, exact)
        except Exception:
            self.breaker.failed("search")
            state.renew()
            state.reason, result = Reason.ERROR, exact
        if not self.options_of(req).keep:
            req.skip_radix_cache_insert = state.plan is not None
        return result

    def forget(self, req: Any) -> None:
        """Called before a request is matched again: drop what its last match led to."""

    def _match(self, req: Any, state: RequestState, params: Any, exact: Any) -> Any:
        """Match the longest exact or approximate prefix, and plan the reuse of spans after it."""
        options = self.options_of(req)
        state.reason = ineligible(req, options)
        if state.reason is not None:
            return exact
        result = exact
        if options.keep:
            result, state.branch = self._match_branches(req, params, exact)
        state.limit = len(params.key)
        prefix = self.plan_step(req, state, compat.matched_length(result), self.most_rows())
        if state.reason is Reason.RENEWAL:
            return exact
        if prefix < compat.matched_length(result):
            result = super().match_prefix(replace(params, key=params.key[:prefix]))  # type: ignore[misc]
        if state.plan is None:
            return result
        return result._replace(
            last_host_node=result.last_device_node,
            best_match_node=result.last_device_node,
            host_hit_length=state.plan.end - prefix,
        )

    def _match_branches(self, req: Any, params: Any, exact: Any) -> tuple[Any, Branch | None]:
        """The branch that holds most of a prompt, if it holds notably more than the exact prefix."""
        best, found = exact, None
        longest = compat.matched_length(exact) + self.options.min_span - 1
        for branch in self.branches.find(self._hashes(req), _BRANCHES_TRIED):
            if len(params.key) <= max(longest, branch.begin):
                continue
            key = self._in_branch(params.key, branch)
            result = super().match_prefix(replace(params, key=key))  # type: ignore[misc]
            if compat.matched_length(result) > max(longest, branch.begin):
                best, found, longest = result, branch, compat.matched_length(result)
        return best, found

    @staticmethod
    def _in_branch(key: Any, branch: Branch) -> Any:
        return compat.key_like(compat.namespace(key), branch.mark(compat.key_tokens(key)))

    def _hashes(self, req: Any) -> Any:
        """Of a prompt's beginnings, for requests with the same options."""
        state = state_of(req)
        if state.hashes is None:
            options = self.options_of(req)
            seed = (self.namespace_of(req), options.selector, options.ratio, options.min_span)
            state.hashes = prefix_hashes(seed, req.origin_input_ids)
        return state.hashes

    def enter_branch(self, req: Any, state: RequestState) -> None:
        """From its plan on the request's KV is approximate."""
        if state.branch is None:
            assert state.plan is not None
            # With compiled donors it must not matter what others ask over the same text.
            common = self._hashes(req)[-1 if self.options.donors == "compiled" else 0]
            state.branch = Branch(state.plan.prefix, state.generation, int(common) % KINDS)

    @staticmethod
    def settle(state: RequestState, plan: Plan, recomputed: int) -> None:
        """If every reused row was recomputed after an exact prefix, the KV is exact."""
        if recomputed == plan.reused and state.branch is not None and state.branch.begin == plan.prefix:
            state.branch = None

    def plan_step(self, req: Any, state: RequestState, prefix: int, most_rows: int) -> int:
        """Plan what the next step of a prefill reuses, as the state's ``plan`` and ``stop``.

        Args:
            req: the request.
            state: of the request.
            prefix: tokens of the prompt whose KV there is.
            most_rows: rows that the step may compute between prefix and tail.

        Returns:
            Tokens of the prefix that the step uses.
        """
        options = self.options_of(req)
        state.plan = state.stop = None
        plan = self._plan(req, state, prefix)
        if plan is None:
            return prefix
        if state.branch is None:
            state.generation = 1 + max(_generation(span.run) for span in plan.spans)
            if state.generation >= GENERATIONS and self._renewal_pays(req, plan):
                state.reason = Reason.RENEWAL
                return prefix
        page_size = self.page_size  # type: ignore[attr-defined]
        state.plan, state.stop = first_step(plan, most(options.ratio), most_rows, page_size, options.min_span)
        return plan.prefix

    def _plan(self, req: Any, state: RequestState, prefix: int, end: int | None = None) -> Plan | None:
        """What of the prompt can be reused; None, with the reason in the state, if that does not pay.

        Args:
            req: the request.
            state: of the request.
            prefix: tokens of the prompt whose KV there is.
            end: where the tail has to start, if that is settled.
        """
        assert self.index is not None
        options = self.options_of(req)
        space, prompt = self.namespace_of(req), len(req.origin_input_ids)
        known = prefix
        if self.options.donors == "compiled" and state.branch is None and state.done is None:
            # What else the tree holds of the prompt would make the answer depend on other requests.
            tokens = np.array(req.origin_input_ids[: state.limit], dtype=np.int64)
            prefix = min(prefix, self.index.known_prefix(space, tokens))
        runs = self._runs(req, state, space, prefix)
        plan = make_plan(runs, prefix, prompt, state.limit, self.page_size, end)  # type: ignore[attr-defined]
        state.reusable = plan.reused if plan else 0
        if plan is None:
            state.reason = None if state.branch is not None else Reason.NOTHING
        elif end is None and not self._pays(plan, prompt, known, options):
            state.reason, plan = Reason.TOO_LITTLE, None
        return plan

    def _runs(self, req: Any, state: RequestState, space: Hashable, start: int) -> list[Run]:
        """Runs of exact donors, and of approximate ones where there are none."""
        assert self.index is not None
        assert self.approximate is not None
        options = self.options_of(req)
        if state.search is None:
            tokens = np.array(req.origin_input_ids, dtype=np.int32)
            state.search = self.index.search(space, tokens)
            state.search_approximate = self.approximate.search(space, tokens)
        assert state.search_approximate is not None
        runs = state.search.runs(start, options.min_span, self._cached_length)
        if self.options.donors == "compiled" or not options.keep:
            return runs
        generation = state.branch.generation if state.branch is not None else GENERATIONS
        others = state.search_approximate.runs(start, options.min_span, self._cached_length)
        return beside(runs, [run for run in others if _generation(run) < generation], options.min_span)

    def _pays(self, plan: Plan, prompt: int, known: int, options: ResolvedOptions) -> bool:
        """Whether a fusion saves enough of the rows that a plain prefill after the known prefix computes."""
        if not options.min_saving:
            return True
        rows = plan.rows(usual(options.ratio)) + prompt - plan.end + min(QUESTION_TOKENS, plan.gap + prompt - plan.end)
        return rows + self._overhead <= (1 - options.min_saving) * (prompt - known)

    def _renewal_pays(self, req: Any, plan: Plan) -> bool:
        """Whether what is new in fusions of the last generation has cost as much as a full prefill saves.

        It is no donor, so it would be computed again in every prompt. A full prefill makes donors of the whole prompt
        (ski rental: never more than twice what knowing the future would cost).
        """
        saved = plan.reused + plan.gap - plan.rows(usual(self.options_of(req).ratio))
        return plan.gap >= self.options.min_span and self._debt + plan.gap >= saved

    def ratio_of(self, plan: Plan, nominal: float) -> float:
        """The share of a plan's reused tokens that is recomputed; see :meth:`Plan.ratio`."""
        assert self.index is not None
        return plan.ratio(nominal, self.index.block)

    def most_rows(self) -> int:
        """Rows that a fusion may compute, so that its step computes no more than one of SGLang's prefills."""
        return self.rows_in(self.chunk)

    def rows_in(self, chunk: int) -> int:
        """Rows between prefix and tail that fit into a step of ``chunk`` rows."""
        page_size: int = self.page_size  # type: ignore[attr-defined]
        return chunk - QUESTION_TOKENS - MIN_TAIL - page_size

    def tail_of(self, req: Any) -> int | None:
        """How many tokens a request's next step may compute after its plan before reuse resumes; None: no limit."""
        state = state_of(req)
        if state.stop is None:
            return None
        begin = state.plan.end if state.plan is not None else compat.prefix_length(req)
        page_size: int = self.page_size  # type: ignore[attr-defined]
        return max((state.stop - begin) // page_size, 1) * page_size

    def options_of(self, req: Any) -> ResolvedOptions:
        state = state_of(req)
        if state.options is None:
            state.options = resolve_or_disable(self.options, req.sampling_params.custom_params)
        return state.options

    @staticmethod
    def namespace_of(req: Any) -> Hashable:
        """What keeps a request's tokens apart from equal tokens of others."""
        return (req.extra_key, getattr(req, "cache_salt", None) or None)

    # ---- donors' slots

    def obtain(self, req: Any, state: RequestState) -> torch.Tensor | None:
        """Private slots, and the spans' sources in the state; None, with a reason, if that cannot be done.

        Nothing is copied yet. What the device still runs for earlier requests may write the donors of this one, or,
        for the last time, slots that were freed and are now private; only :meth:`forward` comes after it in order.
        """
        locks: list[Callable[[], None]] = []
        try:
            for _ in range(2):
                sources = self._sources(state, locks)
                if sources is not None:
                    break
                # A donor was evicted since the match. Others may hold the same text; the tail's start is settled.
                assert state.plan is not None
                plan = self._plan(req, state, state.plan.prefix, state.plan.end)
                if plan is None or plan.prefix != state.plan.prefix:
                    break
                state.plan = plan
            if sources is None:
                state.reason = Reason.EVICTED
                return None
            assert state.plan is not None
            state.sources = torch.cat(sources).to(torch.int64)
            slots = compat.allocate(self, state.plan.end - state.plan.prefix)
            if slots is None:
                state.reason = Reason.NO_ROOM
            return slots
        finally:
            # Donors evicted from here on are overwritten by what runs after the copy, or is copied after it.
            for release in locks:
                release()

    def _sources(self, state: RequestState, locks: list[Callable[[], None]]) -> list[torch.Tensor] | None:
        """The donors' slots of each span, their nodes locked; None if a donor is gone, which is then forgotten."""
        assert self.index is not None
        assert self.approximate is not None
        assert state.plan is not None
        slots: dict[Segment, torch.Tensor] = {}
        for span in state.plan.spans:
            segment = span.run.segment
            index = self.index if segment.mark is None else self.approximate
            if segment not in slots:
                result = self._match_donor(segment)
                locks.append(compat.locked(self, result.last_device_node))
                slots[segment] = compat.matched_slots(self, result)
            if len(slots[segment]) < span.offset + span.length:
                index.forget(segment, len(slots[segment]))
                return None
            index.touch(span.run)
        return [slots[span.run.segment][span.offset : span.offset + span.length] for span in state.plan.spans]

    def _cached_length(self, segment: Segment) -> int:
        """How many tokens of a donor's path the tree still holds."""
        return compat.matched_length(self._match_donor(segment))

    def _match_donor(self, segment: Segment) -> Any:
        """Match a donor's whole path: a part of it would split the tree's nodes."""
        tokens: Any = segment.path(segment.end)
        if isinstance(segment.mark, Branch):
            tokens = segment.mark.mark(tokens.astype(np.int64))
        key = compat.key_like(segment.namespace, tokens)
        return super().match_prefix(compat.match_params(key))  # type: ignore[misc]

    # ---- what became of a prompt

    def begin(self, req: Any) -> None:
        """Note what the first step of a prefill found in the tree."""
        state = state_of(req)
        if state.done is not None:
            return
        prefix = state.plan.prefix if state.plan is not None else compat.prefix_length(req)
        state.done = Done(min(prefix, len(req.origin_input_ids)))
        if state.reason is Reason.RENEWAL:
            self._debt = 0

    def count(self, req: Any, plan: Plan, recomputed: int, charged: float) -> None:
        """Add a fusion to what the steps of a request's prefill have done.

        Args:
            req: the request.
            plan: of the fusion.
            recomputed: reused rows that were recomputed.
            charged: see :class:`a3_sglang.reporting.report.Outcome`.
        """
        state = state_of(req)
        assert state.done is not None
        state.done.reused += plan.reused - recomputed
        state.done.recomputed += recomputed
        state.done.gap += plan.gap
        state.done.charged += charged * (plan.end - plan.prefix)
        if state.branch is not None and state.branch.generation >= GENERATIONS:
            self._debt += plan.gap

    def outcome(self, req: Any) -> Outcome:
        state, done, prompt = state_of(req), state_of(req).done, len(req.origin_input_ids)
        assert done is not None
        continued = max(done.prefix - state.branch.begin, 0) if state.branch is not None else 0
        counts = (done.prefix - continued, continued, done.reused, done.recomputed, done.gap)
        reason = state.reason
        if done.fused and reason is not Reason.ERROR:
            reason = None
        elif not done.fused and state.branch is None:
            reason = reason or Reason.NOTHING
        return Outcome(
            (*counts, prompt - sum(counts)),
            done.charged / done.fused if done.fused else 0.0,
            state.options.selector if state.options is not None else self.options.selector,
            reason,
            state.reusable,
        )


def usual(ratio: Ratio) -> float:
    """The share of the reused tokens that is usually recomputed."""
    return AUTO_USUAL if ratio == "auto" else ratio


def most(ratio: Ratio) -> float:
    """The largest share of the reused tokens that may be recomputed."""
    return AUTO_CAP if ratio == "auto" else ratio


def _generation(run: Run) -> int:
    """Of the donor of a run: 0 if its KV is exact."""
    mark = run.segment.mark
    return mark.generation if isinstance(mark, Branch) else 0
