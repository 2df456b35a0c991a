"""The radix-cache backend ``a3``: SGLang's own tree that also offers spans."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from a3_sglang import seams
from a3_sglang.cache.index import AnyPositionIndex, Run
from a3_sglang.config import Effective, ServerOptions, resolve
from a3_sglang.fusion.executor import Executor, Job, Part, Timings
from a3_sglang.fusion.plan import Plan, make_plan
from a3_sglang.fusion.row_attention import RowGroup
from a3_sglang.selectors import make_selector

logger = logging.getLogger(__name__)

_TIMED = os.environ.get("A3_TIMINGS") == "1"
"""Whether requests report how long the parts of their fusion took."""


@dataclass(slots=True)
class RequestState:
    """What the backend knows of one request; lies on the request, so it lives as long as that.

    Attributes:
        options: what the request runs with; None until it was first matched.
        plan: spans the tree offered at the last match.
        seen: what the plan was made from; the same again means the same plan.
        reason: why there is no plan.
        private: the request's own slots behind its exact prefix, int64; None where it was not fused.
        sources: the donors' slots of its spans, int64 (reused,). It is kept while the request lives: it was made in
            another of the device's streams than the one that reads it.
        waiting: slots are allocated, the fusion has not run.
        recomputed: positions of the reused rows that were recomputed, int64.
        exact: all KV of the request is as a full prefill makes it.
        reported: the report of this admission is written.
    """

    options: Effective | None = None
    plan: Plan | None = None
    seen: Hashable = None
    reason: str | None = None
    private: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    waiting: bool = False
    recomputed: torch.Tensor | None = None
    exact: bool = True
    reported: bool = False


@dataclass(slots=True)
class Counters:
    """Totals since start."""

    fused: int = 0
    plain: int = 0
    reused: int = 0
    recomputed: int = 0
    gap: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


def state_of(req: Any) -> RequestState:
    """The request's state, made on first use."""
    state = getattr(req, "a3", None)
    if state is None:
        state = req.a3 = RequestState()
    return state


class A3Tree:
    """Mixin in front of SGLang's tree class.

    Matches as the tree does; what the tree does not have as a prefix but holds elsewhere is offered as
    obtainable (``host_hit_length``); slots private to the request are allocated when it is admitted, and filled right
    before it runs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.index: AnyPositionIndex | None = None
        self.executor: Executor | None = None
        self.waiting: dict[str, Any] = {}
        self.left: list[Part] = []
        self._inserting: Any = None
        super().__init__(*args, **kwargs)

    def start(self, options: ServerOptions, executor: Executor, capacity: int) -> None:
        """Begin to offer spans.

        Args:
            options: the server's.
            executor: runs the fusions.
            capacity: tokens the KV pool holds.
        """
        self.options = options
        self.executor = executor
        self.counters = Counters()
        self.timings = self._new_timings()
        self.index = AnyPositionIndex(
            options.min_span,
            capacity=2 * capacity,
            page_size=self.page_size,  # type: ignore[attr-defined]
        )

    # ---- donors

    def insert(self, params: Any) -> Any:
        result = super().insert(params)  # type: ignore[misc]
        if self.index is not None:
            try:
                self.index.add(seams.namespace(params.key), seams.key_tokens(params.key)[: self._donated()])
            except Exception:
                logger.exception("a3: a donor could not be indexed; the index starts anew")
                self.index.clear()
        return result

    def _donated(self) -> int | None:
        """How many tokens of what is being inserted may be reused elsewhere; None for all."""
        if self.options.donors == "harvest":
            return None
        req = self._inserting
        # The answer to a donor is none.
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
        if self.index is not None:
            self.index.clear()
            self.waiting.clear()

    # ---- match and admission

    def match_prefix(self, params: Any) -> Any:
        result = super().match_prefix(params)  # type: ignore[misc]
        req = getattr(params, "req", None)
        if req is None or self.index is None:
            return result
        state = state_of(req)
        self._drop_unused(req, state)
        state.private, state.recomputed, state.exact, state.reported = None, None, True, False
        try:
            state.plan = self._plan(req, state, params.key, seams.matched_length(result))
        except Exception:
            # An error in the search is a miss: the request gets its full prefill.
            logger.exception("a3: no plan for request %s", req.rid)
            state.plan, state.reason = None, "the search failed"
        if state.plan is None or result.host_hit_length:
            return result
        if state.plan.prefix < seams.matched_length(result):
            result = super().match_prefix(replace(params, key=params.key[: state.plan.prefix]))  # type: ignore[misc]
        return result._replace(
            last_host_node=result.last_device_node,
            best_match_node=result.last_device_node,
            host_hit_length=state.plan.end - state.plan.prefix,
        )

    def _plan(self, req: Any, state: RequestState, key: Any, prefix: int) -> Plan | None:
        assert self.index is not None
        options = self._options_of(req)
        seen = (self.index.version, len(key), prefix)
        if state.seen == seen:
            return state.plan
        state.seen, state.reason = seen, _unfit(req, options)
        if state.reason is not None:
            return None
        space, tokens = seams.namespace(key), seams.key_tokens(key)
        prompt, held_prefix = len(req.origin_input_ids), prefix
        for _ in range(4):
            if self.options.donors == "compiled":
                # What else the tree holds of the prompt would make the answer depend on other requests.
                prefix = min(held_prefix, self.index.known_prefix(space, tokens))
            runs = self.index.find(space, tokens, prefix, options.min_span)
            plan = make_plan(runs, prefix, prompt, len(tokens), self.page_size)  # type: ignore[attr-defined]
            reused = plan.reused if plan else 0
            if reused < options.min_reuse:
                state.reason = f"{reused} reusable tokens, fewer than min_reuse {options.min_reuse}"
                return None
            assert plan is not None
            held = [self._held(space, span.run) for span in plan.spans]
            if all(held):
                state.seen = (self.index.version, len(key), held_prefix)
                return plan
        state.reason = "the donors were evicted"
        return None

    def _options_of(self, req: Any) -> Effective:
        state = state_of(req)
        if state.options is None:
            state.options = resolve(self.options, req.sampling_params.custom_params)
        return state.options

    def _held(self, space: Hashable, run: Run) -> bool:
        """Whether the tree still has this run; the index forgets it where not."""
        held = seams.matched_length(self._match_path(space, run))
        if held < run.offset + run.length:
            assert self.index is not None
            self.index.forget(run.segment, held)
            return False
        return True

    def _match_path(self, space: Hashable, run: Run) -> Any:
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        path = run.path(self.page_size)  # type: ignore[attr-defined]
        return super().match_prefix(MatchPrefixParams(key=seams.key_like(space, path)))  # type: ignore[misc]

    def init_load_back(self, params: Any) -> Any:
        req = params.req
        state = state_of(req) if req is not None else None
        if state is None or state.plan is None:
            return super().init_load_back(params)  # type: ignore[misc]
        try:
            slots = self._obtain(req, state.plan)
        except Exception:
            logger.exception("a3: the spans of request %s could not be found again", req.rid)
            slots, state.reason = None, "the search failed"
        if slots is None:
            state.plan = state.seen = None
            return seams.loaded(torch.empty(0, dtype=torch.int64, device=self.device), req.last_node)  # type: ignore[attr-defined]
        state.private, state.waiting = slots, True
        self.waiting[req.rid] = req
        return seams.loaded(slots, req.last_node)

    def _obtain(self, req: Any, plan: Plan) -> torch.Tensor | None:
        """Private slots, and the spans' sources in the state; None, with a reason, where that cannot be done.

        Nothing is copied yet. What the device runs for the requests before may still write donors of this one, or,
        for the last time, slots that were freed and are now private: only :meth:`fuse` stands behind it in order.
        """
        assert self.index is not None
        state = state_of(req)
        space = self._namespace_of(req)
        unlock, sources = [], []
        try:
            for span in plan.spans:
                result = self._match_path(space, span.run)
                if seams.matched_length(result) < span.offset + span.length:
                    self.index.forget(span.run.segment, seams.matched_length(result))
                    state.reason = "the donors were evicted"
                    return None
                unlock.append(seams.locked(self, result.last_device_node))
                sources.append(seams.matched_slots(self, result)[span.offset : span.offset + span.length])
                self.index.touch(span.run)
            slots = seams.allocate(self, plan.end - plan.prefix)
            if slots is None:
                state.reason = "no room for private slots"
                return None
            state.sources = torch.cat(sources).to(torch.int64)
            return slots
        finally:
            # Donors evicted from here on are overwritten by what runs after the copy, or is copied after it.
            for release in unlock:
                release()

    def _namespace_of(self, req: Any) -> Hashable:
        return (req.extra_key, getattr(req, "cache_salt", None) or None)

    def _drop_unused(self, req: Any, state: RequestState) -> None:
        """Slots of an admission that came to nothing go back."""
        if state.waiting:
            self.token_to_kv_pool_allocator.free(state.private)  # type: ignore[attr-defined]
            state.waiting, state.private = False, None
        self.waiting.pop(req.rid, None)

    def load_back_is_cache_owned(self) -> bool:
        return False

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        state = state_of(req)
        if state.private is None or state.plan is None:
            return super().prefix_device_indices(req)  # type: ignore[misc]
        path = self.path_device_indices(req.last_node)  # type: ignore[attr-defined]
        return torch.cat([path[: state.plan.prefix], state.private.to(path.dtype)])[: req.prefix_len]

    # ---- end: fused KV is never inserted

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        if not self._fused(req):
            with self._insertion(req):
                super().checkpoint(req, up_to=up_to, **kwargs)  # type: ignore[misc]

    def on_release(self, req: Any, **kwargs: Any) -> None:
        if self._fused(req):
            kwargs = dict.fromkeys(kwargs, False)
        with self._insertion(req):
            super().on_release(req, **kwargs)  # type: ignore[misc]

    def insert_req(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        if not self._fused(req):
            with self._insertion(req):
                super().insert_req(req, up_to=up_to, **kwargs)  # type: ignore[misc]

    def cache_unfinished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        if self._fused(req):
            seams.keep_row_as_prefix(self, req)
            return
        with self._insertion(req):
            super().cache_unfinished_req(req, *args, **kwargs)  # type: ignore[misc]

    def cache_finished_req(self, req: Any, is_insert: bool = True, **kwargs: Any) -> None:
        with self._insertion(req):
            super().cache_finished_req(req, is_insert=is_insert and not self._fused(req), **kwargs)  # type: ignore[misc]

    @staticmethod
    def _fused(req: Any) -> bool:
        return state_of(req).private is not None

    # ---- fusion

    def fuse(self, batch: Any) -> bool:
        """Begin the fusion of a batch's newly admitted requests and write all new reports.

        The last pass of it is left to :meth:`extend` where that may take it along.

        Returns:
            Whether any request of the batch is fused.
        """
        assert self.executor is not None
        fresh = [req for req in batch.reqs if state_of(req).waiting]
        jobs = [self._job(req) for req in fresh]
        # By order of admission: what one request's donors gave up may be another's by now.
        admitted = list(self.waiting)
        for req, job in sorted(zip(fresh, jobs, strict=True), key=lambda pair: admitted.index(pair[0].rid)):
            self._fill(req, job)
        fused = [self._fused(req) for req in batch.reqs]
        if jobs and (self._on_cpu or all(fused)):
            self.left = self.executor.prepare(jobs, self.timings, sum(batch.extend_lens))
        elif jobs:
            self.executor.run(jobs, self.timings)
        for req, job in zip(fresh, jobs, strict=True):
            state = state_of(req)
            state.waiting, state.recomputed, state.exact = False, job.recomputed, job.exact
            self.waiting.pop(req.rid, None)
            self._report(req, job, job.charged(self.executor.model.depth))
        for req in batch.reqs:
            self._report(req, None, 0.0)
        for req in list(self.waiting.values()):
            self._drop_unused(req, state_of(req))
        return any(fused)

    def _fill(self, req: Any, job: Job) -> None:
        """Copy a request's spans; should that fail, all of them will be recomputed."""
        assert self.executor is not None
        sources = state_of(req).sources
        assert sources is not None
        try:
            with self.timings.add("copy"):
                self.executor.fill(job, sources)
        except Exception:
            logger.exception("a3: the spans of request %s could not be copied; they are recomputed", req.rid)
            job.ratio = 1.0

    @property
    def _on_cpu(self) -> bool:
        return bool(self.device.type == "cpu")  # type: ignore[attr-defined]

    @contextmanager
    def extend(self, batch: Any) -> Iterator[None]:
        """A context for the extend of a fused batch.

        It takes along what is left to recompute, and then attends as the fusion does. On a CPU it always does the
        latter, as SGLang's own attention would compute every prefix again; elsewhere only where all requests of the
        batch are fused, as the others keep SGLang's attention.

        With ``A3_TIMINGS=1`` the requests report how long each part took; where the extend takes the recompute
        along, all of it counts as recompute.
        """
        assert self.executor is not None
        timings, self.timings = self.timings, self._new_timings()
        left, self.left = self.left, []
        with timings.add("recompute" if left else "tail"):
            if left or self._on_cpu:
                with self.executor.extended(left, self._groups(batch), batch.out_cache_loc.to(torch.int64)):
                    yield
            else:
                yield
        if _TIMED:
            taken = timings.milliseconds()
            for req in batch.reqs:
                if self._fused(req):
                    req.customized_info["a3_ms"] = [taken]

    def _new_timings(self) -> Timings:
        return Timings(self.device if _TIMED else None)  # type: ignore[attr-defined]

    def _groups(self, batch: Any) -> list[RowGroup]:
        """The rows of a batch's extend."""
        groups, begin = [], 0
        for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            slots = seams.row(self, req)[: prefix + length].to(torch.int64)
            visible = torch.arange(prefix, prefix + length, device=slots.device) + 1
            groups.append(RowGroup(begin, begin + length, slots, visible, state_of(req).exact))
            begin += length
        return groups

    def after_admission(self, req: Any) -> None:
        """Private slots stay the request's own, whatever the admission made of them."""
        state = state_of(req)
        if state.waiting and state.plan is not None:
            seams.protect(req, state.plan.prefix)

    def _job(self, req: Any) -> Job:
        state = state_of(req)
        plan, options = state.plan, state.options
        assert plan is not None
        assert options is not None
        assert state.private is not None
        slots = torch.cat([seams.row(self, req)[: plan.prefix].to(torch.int64), state.private.to(torch.int64)])
        tokens = torch.from_numpy(np.asarray(req.origin_input_ids, dtype=np.int64))
        if not self._on_cpu:
            # From memory that is not pinned the copy would wait for all that the device has to do.
            tokens = tokens.pin_memory().to(slots.device, non_blocking=True)
        return Job(plan, tokens, slots, make_selector(options.selector), options.ratio)

    def _report(self, req: Any, job: Job | None, charged: float) -> None:
        state = state_of(req)
        if state.reported:
            return
        state.reported = True
        prompt = len(req.origin_input_ids)
        options = state.options
        report: dict[str, Any]
        if job is None:
            prefix = min(seams.prefix_length(req), prompt)
            report = {"prefix": prefix, "reused": 0, "recomputed": 0, "gap": 0, "tail": prompt - prefix}
            state.reason = state.reason or "nothing to reuse"
            self.counters.plain += 1
            self.counters.reasons[state.reason] = self.counters.reasons.get(state.reason, 0) + 1
        else:
            plan, recomputed = job.plan, len(job.recomputed)
            report = {
                "prefix": plan.prefix,
                "reused": plan.reused - recomputed,
                "recomputed": recomputed,
                "gap": plan.gap,
                "tail": max(prompt - plan.end, 0),
            }
            self.counters.fused += 1
            self.counters.reused += plan.reused - recomputed
            self.counters.recomputed += recomputed
            self.counters.gap += plan.gap
        report |= {
            "charged": round(charged, 6),
            "selector": options.selector if options is not None else self.options.selector,
            "reason": None if job is not None else state.reason,
        }
        req.customized_info = {**(req.customized_info or {}), "a3": [report]}


def _unfit(req: Any, options: Effective) -> str | None:
    """Why this request gets a full prefill whatever the index holds."""
    if not options.enabled:
        return "off"
    if options.donor:
        return "the request is a donor"
    if getattr(req, "lora_id", None) is not None:
        return "the request uses a LoRA adapter"
    if getattr(req, "input_embeds", None) is not None:
        return "the request brings embeddings"
    if getattr(req, "multimodal_inputs", None) is not None:
        return "the request is multimodal"
    if getattr(req, "session", None) is not None:
        return "the request belongs to a session"
    return None
