"""The radix-cache backend ``a3``: SGLang's own tree that also offers spans."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from a3_sglang import seams
from a3_sglang.cache.account import Account
from a3_sglang.cache.branches import GENERATIONS, KINDS, Branch, Branches, prefix_hashes
from a3_sglang.cache.breaker import Breaker
from a3_sglang.cache.index import AnyPositionIndex, Run, Segment, beside
from a3_sglang.cache.report import Outcome
from a3_sglang.cache.request import Done, Reason, RequestState, ineligible, state_of
from a3_sglang.config import Effective, ServerOptions, resolve_leniently
from a3_sglang.fusion.executor import Executor, Job, Part, Timings
from a3_sglang.fusion.plan import MIN_TAIL, QUESTION_TOKENS, Plan, first_step, make_plan
from a3_sglang.fusion.row_attention import RowGroup
from a3_sglang.metrics import Metrics
from a3_sglang.selectors import make_selector
from a3_sglang.selectors.base import AUTO_CAP, AUTO_USUAL, Ratio

_TIMED = os.environ.get("A3_TIMINGS") == "1"
"""Whether requests report how long the parts of their fusion took."""
_BRANCHES_TRIED = 8
"""Branches whose tokens are compared with a prompt's, at most."""


class A3Tree:
    """Mixin in front of SGLang's tree class.

    Matches as the tree does; what the tree does not have as a prefix but holds elsewhere is offered as
    obtainable (``host_hit_length``). Slots for it are allocated when the request is admitted and filled right before
    it runs. Then they go into the tree like any computed KV, in a branch that only requests which allow fusion match
    (:mod:`a3_sglang.cache.branches`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.index: AnyPositionIndex | None = None
        """Donors with exact KV."""
        self.approximate: AnyPositionIndex | None = None
        """Donors with approximate KV, marked with their :class:`Branch`."""
        self.branches = Branches()
        self._debt = 0
        """Rows of gaps that fusions of the last generation computed since the last renewal."""
        self.executor: Executor | None = None
        self.waiting: dict[int, Any] = {}
        """Admitted requests whose fusion has not run, by identity, in order of admission."""
        self._inserting: Any = None
        super().__init__(*args, **kwargs)

    def start(
        self,
        options: ServerOptions,
        executor: Executor,
        capacity: int,
        overhead: int = 0,
        metrics: Metrics | None = None,
        log_each: bool = False,
        line_ends: Any = None,
    ) -> None:
        """Begin to offer spans.

        Args:
            options: the server's.
            executor: runs the fusions.
            capacity: tokens the KV pool holds.
            overhead: rows that take as long to compute as what a fusion costs besides its own rows.
            metrics: where all of it is counted.
            log_each: whether the log has a line for every request.
            line_ends: bool (vocabulary,), the tokens that end a line; None if that is not known.
        """
        self.options = options
        self.executor = executor
        self._overhead = overhead
        self.metrics = metrics = metrics or Metrics(None)
        self.account = Account(metrics, log_each)
        self.breaker = Breaker(metrics.failed, metrics.turned_off)
        self.index, self.approximate = (
            AnyPositionIndex(
                options.min_span,
                capacity=2 * capacity,
                page_size=self.page_size,  # type: ignore[attr-defined]
                line_ends=line_ends,
            )
            for _ in range(2)
        )

    # ---- donors

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
        space, req = seams.namespace(key), self._inserting
        if branch is None:
            self.index.add(space, seams.key_tokens(key)[: self._donated()])
            return
        if len(key) <= branch.begin:
            return
        compiled = self.options.donors == "compiled"
        self.branches.add(self._hashes(req), len(req.origin_input_ids) if compiled else branch.begin, branch)
        if not compiled and branch.generation < GENERATIONS:
            self.approximate.add(space, branch.tokens(seams.key_tokens(key)), branch)

    def _donated(self) -> int | None:
        """How many tokens of what is being inserted may be reused elsewhere; None for all."""
        if self.options.donors == "harvest":
            return None
        req = self._inserting
        # The answer to a donor is no donor.
        return len(req.origin_input_ids) if req is not None and self._options_of(req).donor else 0

    @contextmanager
    def _insertion(self, req: Any) -> Iterator[None]:
        """While the tree inserts on a request's behalf."""
        before, self._inserting = self._inserting, req
        try:
            yield
        finally:
            self._inserting = before

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._clear_indexes()
        self.waiting.clear()

    def _clear_indexes(self) -> None:
        for index in (self.index, self.approximate, self.branches):
            if index is not None:
                index.clear()
        self._debt = 0

    # ---- match and admission

    def match_prefix(self, params: Any) -> Any:
        if self._inserting is not None:
            # Releases before 0.5.23 look up what they have inserted.
            return super().match_prefix(self._as_inserted(params)[0])  # type: ignore[misc]
        exact = super().match_prefix(params)  # type: ignore[misc]
        req = getattr(params, "req", None)
        if req is None or self.index is None:
            return exact
        state = state_of(req)
        self._drop_unused(req, state)
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
        if not self._options_of(req).keep:
            req.skip_radix_cache_insert = state.plan is not None
        return result

    def _match(self, req: Any, state: RequestState, params: Any, exact: Any) -> Any:
        """Match the longest exact or approximate prefix, and plan the reuse of spans after it."""
        options = self._options_of(req)
        state.reason = ineligible(req, options)
        if state.reason is not None:
            return exact
        result = exact
        if options.keep:
            result, state.branch = self._match_branches(req, params, exact)
        state.limit = len(params.key)
        prefix = self._plan_step(req, state, seams.matched_length(result), self._most_rows())
        if state.reason is Reason.RENEWAL:
            return exact
        if prefix < seams.matched_length(result):
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
        longest = seams.matched_length(exact) + self.options.min_span - 1
        for branch in self.branches.find(self._hashes(req), _BRANCHES_TRIED):
            if len(params.key) <= max(longest, branch.begin):
                continue
            key = self._in_branch(params.key, branch)
            result = super().match_prefix(replace(params, key=key))  # type: ignore[misc]
            if seams.matched_length(result) > max(longest, branch.begin):
                best, found, longest = result, branch, seams.matched_length(result)
        return best, found

    @staticmethod
    def _in_branch(key: Any, branch: Branch) -> Any:
        return seams.key_like(seams.namespace(key), branch.mark(seams.key_tokens(key)))

    def _hashes(self, req: Any) -> Any:
        """Of a prompt's beginnings, for requests with the same options."""
        state = state_of(req)
        if state.hashes is None:
            options = self._options_of(req)
            seed = (self._namespace_of(req), options.selector, options.ratio, options.min_span)
            state.hashes = prefix_hashes(seed, req.origin_input_ids)
        return state.hashes

    def _plan_step(self, req: Any, state: RequestState, prefix: int, most_rows: int) -> int:
        """Plan what the next step of a prefill reuses, as the state's ``plan`` and ``stop``.

        Args:
            req: the request.
            state: of the request.
            prefix: tokens of the prompt whose KV there is.
            most_rows: rows that the step may compute between prefix and tail.

        Returns:
            Tokens of the prefix that the step uses.
        """
        options = self._options_of(req)
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
        state.plan, state.stop = first_step(plan, _most(options.ratio), most_rows, page_size, options.min_span)
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
        options = self._options_of(req)
        space, prompt = self._namespace_of(req), len(req.origin_input_ids)
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
        options = self._options_of(req)
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

    def _most_rows(self) -> int:
        """Rows that a fusion may compute, so that its step computes no more than one of SGLang's prefills."""
        assert self.executor is not None
        return self.rows_in(self.executor.slice_rows)

    def rows_in(self, chunk: int) -> int:
        """Rows between prefix and tail that a step of so many rows has room for."""
        page_size: int = self.page_size  # type: ignore[attr-defined]
        return chunk - QUESTION_TOKENS - MIN_TAIL - page_size

    def rows_of(self, req: Any) -> int:
        """Rows that a request's fusion computes besides its tail, the probe's among them, at most; whole pages."""
        rows = self.context_rows_of(req)
        rows += QUESTION_TOKENS if rows else 0
        return rows + -rows % self.page_size  # type: ignore[attr-defined]

    def planned_of(self, req: Any) -> int:
        """Tokens between prefix and tail of a request's fusion; 0 if it is not fused."""
        plan = state_of(req).plan
        return plan.end - plan.prefix if plan is not None else 0

    def context_rows_of(self, req: Any) -> int:
        """Rows between prefix and tail that a request's fusion computes, at most; 0 if it is not fused."""
        state = state_of(req)
        if state.plan is None or state.options is None:
            return 0
        return state.plan.rows(_most(state.options.ratio))

    def _renewal_pays(self, req: Any, plan: Plan) -> bool:
        """Whether what is new in fusions of the last generation has cost as much as a full prefill saves.

        It is no donor, so it would be computed again in every prompt. A full prefill makes donors of the whole prompt
        (ski rental: never more than twice what knowing the future would cost).
        """
        saved = plan.reused + plan.gap - plan.rows(_usual(self._options_of(req).ratio))
        return plan.gap >= self.options.min_span and self._debt + plan.gap >= saved

    def _pays(self, plan: Plan, prompt: int, known: int, options: Effective) -> bool:
        """Whether a fusion saves enough of the rows that a plain prefill after the known prefix computes."""
        if not options.min_saving:
            return True
        rows = plan.rows(_usual(options.ratio)) + prompt - plan.end + min(QUESTION_TOKENS, plan.gap + prompt - plan.end)
        return rows + self._overhead <= (1 - options.min_saving) * (prompt - known)

    def _options_of(self, req: Any) -> Effective:
        state = state_of(req)
        if state.options is None:
            state.options = resolve_leniently(self.options, req.sampling_params.custom_params)
        return state.options

    def _cached_length(self, segment: Segment) -> int:
        """How many tokens of a donor's path the tree still holds."""
        return seams.matched_length(self._match_donor(segment))

    def _match_donor(self, segment: Segment) -> Any:
        """Match a donor's whole path: a part of it would split the tree's nodes."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        tokens: Any = segment.path(segment.end)
        if isinstance(segment.mark, Branch):
            tokens = segment.mark.mark(tokens.astype(np.int64))
        key = seams.key_like(segment.namespace, tokens)
        return super().match_prefix(MatchPrefixParams(key=key))  # type: ignore[misc]

    def init_load_back(self, params: Any) -> Any:
        req = params.req
        state = state_of(req) if req is not None else None
        if state is None or state.plan is None:
            return super().init_load_back(params)  # type: ignore[misc]
        try:
            slots = self._obtain(req, state)
        except Exception:
            self.breaker.failed("admission")
            slots, state.reason = None, Reason.ERROR
        if slots is None:
            state.plan = state.stop = None
            return seams.loaded(torch.empty(0, dtype=torch.int64, device=self.device), req.last_node)  # type: ignore[attr-defined]
        self._admit(req, state, slots)
        return seams.loaded(slots, req.last_node)

    def _admit(self, req: Any, state: RequestState, slots: torch.Tensor) -> None:
        """A fusion will run in the request's next step, into these slots."""
        assert state.plan is not None
        state.private, state.waiting = slots, True
        self.waiting[id(req)] = req
        if state.branch is None:
            # With compiled donors it must not matter what others ask over the same text.
            common = self._hashes(req)[-1 if self.options.donors == "compiled" else 0]
            state.branch = Branch(state.plan.prefix, state.generation, int(common) % KINDS)

    def plan_next(self, req: Any, most_rows: int) -> None:
        """Plan the next step of a chunked prefill, and count what it reuses as the request's prefix.

        Args:
            req: a request that has had a step.
            most_rows: rows that this one may compute.
        """
        state, page_size = state_of(req), self.page_size  # type: ignore[attr-defined]
        state.plan = None
        prefix = seams.prefix_length(req)
        if state.stop is None or self.breaker.open or prefix % page_size:
            return
        if self.options.donors == "compiled" and prefix < state.stop - state.stop % page_size:
            # Where chunks of new text end depends on other requests, so that the plan must not.
            return
        slots = None
        try:
            self._plan_step(req, state, prefix, min(most_rows, self._most_rows()))
            if state.plan is not None:
                slots = self._obtain(req, state)
        except Exception:
            self.breaker.failed("admission")
            state.reason, state.stop = Reason.ERROR, None
        if slots is None:
            state.plan = None
            return
        self._admit(req, state, slots)
        seams.extend_prefix(self, req, slots)
        if not self._options_of(req).keep:
            req.skip_radix_cache_insert = True

    def after_next(self, req: Any, admitted: bool) -> None:
        """Take back :meth:`plan_next` if the request has no step now."""
        state = state_of(req)
        if state.plan is not None and not admitted:
            seams.shorten_prefix(req, state.plan.prefix)
            self._drop_unused(req, state)
            state.plan = None

    def fit(self, req: Any, most_rows: int) -> None:
        """Plan a waiting request's first step again, with fewer rows."""
        state = state_of(req)
        if state.plan is not None and self.context_rows_of(req) > most_rows:
            self._plan_step(req, state, state.plan.prefix, most_rows)
            req.host_hit_length = self.planned_of(req)

    def tail_of(self, req: Any) -> int | None:
        """Tokens that a request's next step computes after its plan, at most: what comes then is reused."""
        state = state_of(req)
        if state.stop is None:
            return None
        begin = state.plan.end if state.plan is not None else seams.prefix_length(req)
        page_size: int = self.page_size  # type: ignore[attr-defined]
        return max((state.stop - begin) // page_size, 1) * page_size

    def _obtain(self, req: Any, state: RequestState) -> torch.Tensor | None:
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
            slots = seams.allocate(self, state.plan.end - state.plan.prefix)
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
                locks.append(seams.locked(self, result.last_device_node))
                slots[segment] = seams.matched_slots(self, result)
            if len(slots[segment]) < span.offset + span.length:
                index.forget(segment, len(slots[segment]))
                return None
            index.touch(span.run)
        return [slots[span.run.segment][span.offset : span.offset + span.length] for span in state.plan.spans]

    def _namespace_of(self, req: Any) -> Hashable:
        return (req.extra_key, getattr(req, "cache_salt", None) or None)

    def _drop_unused(self, req: Any, state: RequestState) -> None:
        """Slots of an admission that came to nothing go back."""
        if state.waiting:
            self.token_to_kv_pool_allocator.free(state.private)  # type: ignore[attr-defined]
            state.waiting, state.private = False, None
        self.waiting.pop(id(req), None)

    def after_admission(self, req: Any, admitted: bool) -> None:
        """Slots for a fusion stay the request's own until they are inserted, whatever the admission made of them."""
        state = state_of(req)
        if not admitted:
            self._drop_unused(req, state)
        elif state.waiting and state.plan is not None:
            seams.protect(req, state.plan.prefix)

    def load_back_is_cache_owned(self) -> bool:
        return False

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        state = state_of(req)
        if not state.waiting or state.private is None or state.plan is None:
            return super().prefix_device_indices(req)  # type: ignore[misc]
        path = self.path_device_indices(req.last_node)  # type: ignore[attr-defined]
        return torch.cat([path[: state.plan.prefix], state.private.to(path.dtype)])[: req.prefix_len]

    # ---- insertion of what a request computed

    def checkpoint(self, req: Any, **kwargs: Any) -> None:
        with self._insertion(req):
            super().checkpoint(req, **kwargs)  # type: ignore[misc]

    def insert_req(self, req: Any, **kwargs: Any) -> None:
        with self._insertion(req):
            super().insert_req(req, **kwargs)  # type: ignore[misc]

    def cache_unfinished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        with self._insertion(req):
            super().cache_unfinished_req(req, *args, **kwargs)  # type: ignore[misc]

    def cache_finished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        with self._insertion(req):
            super().cache_finished_req(req, *args, **kwargs)  # type: ignore[misc]

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
        jobs: dict[int, Job] = {}
        if not fused:
            result = run()
        else:
            timed = _TIMED or self.metrics.on
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
            self._begin(req)
        for req in admitted:
            self._finish_fusion(req, jobs.get(id(req)))
        self._report(batch)
        if fused and _TIMED:
            taken = timings.milliseconds()
            for req in fused:
                req.customized_info["a3_ms"] = [taken]
        for req in list(self.waiting.values()):
            self._drop_unused(req, state_of(req))
        return result

    def _run_fused(self, batch: Any, admitted: list[tuple[Any, Job]], timings: Timings, run: Callable[[], Any]) -> Any:
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
                self.executor.fill(job, sources)
        left: list[Part] = []
        if jobs and (on_cpu or all(state_of(req).branch is not None for req in batch.reqs)):
            left = self.executor.prepare(jobs, timings, sum(batch.extend_lens))
        elif jobs:
            self.executor.run(jobs, timings)
        for req, job in admitted:
            self._settle(req, job)
        with timings.add("recompute" if left else "tail"):
            if not left and not on_cpu:
                return run()
            with self.executor.extended(left, self._groups(batch), batch.out_cache_loc.to(torch.int64)):
                return run()

    def _recompute_everything(self, admitted: list[Any], jobs: dict[int, Job]) -> None:
        """Compute the KV between prefix and tail of each request in full, after an error in the fusion."""
        assert self.executor is not None
        for req in admitted:
            state = state_of(req)
            state.reason = Reason.ERROR
            try:
                job = jobs[id(req)] = self._job(req)
                self.executor.recompute_all(job)
                self._settle(req, job)
            except Exception:
                self.breaker.failed("full recompute")
                self._abort(req)

    @staticmethod
    def _settle(req: Any, job: Job) -> None:
        """What was recomputed in full after an exact prefix is exact."""
        state = state_of(req)
        if job.exact and state.branch is not None and state.branch.begin == job.plan.prefix:
            state.branch = None

    def _abort(self, req: Any) -> None:
        """End a request whose KV cannot be made; its slots hold nothing, so that its last forward stays finite."""
        assert self.executor is not None
        private = state_of(req).private
        with suppress(Exception):
            for pool in (*self.executor.model.keys, *self.executor.model.values):
                pool[private] = 0
        seams.abort(req, "a3: the prompt's KV could not be computed; the server's log has the error")

    def _begin(self, req: Any) -> None:
        """Note what the first step of a prefill found in the tree."""
        state = state_of(req)
        if state.done is not None:
            return
        prefix = state.plan.prefix if state.plan is not None else seams.prefix_length(req)
        state.done = Done(min(prefix, len(req.origin_input_ids)))
        if state.reason is Reason.RENEWAL:
            self._debt = 0

    def _finish_fusion(self, req: Any, job: Job | None) -> None:
        """Add what a fusion did to what the steps before it have done."""
        state = state_of(req)
        state.waiting = False
        state.recomputed = job.recomputed if job is not None else None
        self.waiting.pop(id(req), None)
        if job is None:
            return
        assert self.executor is not None
        assert state.done is not None
        recomputed, gap = len(job.recomputed), job.plan.gap
        seams.count_as_computed(req, recomputed + gap)
        state.done.reused += job.plan.reused - recomputed
        state.done.recomputed += recomputed
        state.done.gap += gap
        state.done.charged += job.charged(self.executor.model.depth) * (job.plan.end - job.plan.prefix)
        if state.branch is not None and state.branch.generation >= GENERATIONS:
            self._debt += gap

    def _groups(self, batch: Any) -> list[RowGroup]:
        """The rows of a batch's extend."""
        groups, begin = [], 0
        for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            slots = seams.row(self, req)[: prefix + length].to(torch.int64)
            visible = torch.arange(prefix, prefix + length, device=slots.device) + 1
            groups.append(RowGroup(begin, begin + length, slots, visible, state_of(req).branch is None))
            begin += length
        return groups

    def _job(self, req: Any) -> Job:
        state = state_of(req)
        plan, options = state.plan, state.options
        assert plan is not None
        assert options is not None
        assert state.private is not None
        assert self.index is not None
        slots = torch.cat([seams.row(self, req)[: plan.prefix].to(torch.int64), state.private.to(torch.int64)])
        tokens = torch.from_numpy(np.asarray(req.origin_input_ids, dtype=np.int64))
        if tokens.device != slots.device:
            # From memory that is not pinned the copy would wait for all that the device has to do.
            tokens = tokens.pin_memory().to(slots.device, non_blocking=True)
        ratio = options.ratio if options.ratio == "auto" else plan.ratio(options.ratio, self.index.block)
        return Job(plan, tokens, slots, make_selector(options.selector), ratio, options.question)

    def _report(self, batch: Any) -> None:
        """Write the reports of what the requests' steps have done so far, and account for prompts that are through."""
        assert self.index is not None
        assert self.approximate is not None
        ended = []
        for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            state, outcome = state_of(req), self._outcome(req)
            report = outcome.report(exact=self.options.report == "exact")
            req.customized_info = {**(req.customized_info or {}), "a3": [report]}
            if not state.accounted and prefix + length >= len(req.origin_input_ids):
                state.accounted = True
                ended.append((req.rid, outcome))
        self.account.prefilled(ended)
        self.metrics.indexed(len(self.index), len(self.approximate))

    def _outcome(self, req: Any) -> Outcome:
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


def _usual(ratio: Ratio) -> float:
    """The share of the reused tokens that is usually recomputed."""
    return AUTO_USUAL if ratio == "auto" else ratio


def _most(ratio: Ratio) -> float:
    """The largest share of the reused tokens that may be recomputed."""
    return AUTO_CAP if ratio == "auto" else ratio


def _generation(run: Run) -> int:
    """Of the donor of a run: 0 if its KV is exact."""
    mark = run.segment.mark
    return mark.generation if isinstance(mark, Branch) else 0
