"""SGLang's radix tree with indexes of the donors and branches that it holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from a3_sglang.config import ResolvedOptions, ServerOptions, resolve_or_disable
from a3_sglang.integration import compat
from a3_sglang.integration.circuit_breaker import CircuitBreaker
from a3_sglang.integration.insert_tracker import InsertTracker
from a3_sglang.integration.request_state import state_of
from a3_sglang.matching.branches import GENERATIONS, Branch, Branches, generation_of, prefix_hashes
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.plan import Plan
from a3_sglang.matching.search import PromptSearch
from a3_sglang.matching.segment import Segment
from a3_sglang.matching.span import Span, merge_spans
from a3_sglang.reporting.metrics import Metrics


class IndexedRadixCache(InsertTracker):
    """Mixin in front of SGLang's tree class that indexes inserted paths as donors and finds them in prompts.

    Attributes:
        index: donors with exact KV; None until :meth:`start_indexing`.
        approximate: donors with approximate KV, marked with their :class:`Branch`.
        branches: paths with approximate KV that a prompt can continue.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.index: AnyPositionIndex | None = None
        self.approximate: AnyPositionIndex | None = None
        self.branches = Branches()
        super().__init__(*args, **kwargs)

    def start_indexing(
        self, options: ServerOptions, capacity: int, metrics: Metrics | None = None, line_ends: Any = None
    ) -> None:
        """Start to index inserted paths.

        Args:
            options: of the server.
            capacity: tokens that the KV pool holds.
            metrics: counts failures.
            line_ends: bool (vocabulary,), the tokens that end a line; None if they are unknown.
        """
        self.options = options
        self.metrics = metrics or Metrics(None)
        self.breaker = CircuitBreaker(self.metrics.failed, self.metrics.turned_off)
        self.index, self.approximate = (
            AnyPositionIndex(options.min_span, capacity=2 * capacity, page_size=self.page_size, line_ends=line_ends)
            for _ in range(2)
        )

    def options_of(self, req: Any) -> ResolvedOptions:
        """The options that a request runs with."""
        state = state_of(req)
        if state.options is None:
            state.options = resolve_or_disable(self.options, req.sampling_params.custom_params)
        return state.options

    @staticmethod
    def namespace_of(req: Any) -> Hashable:
        """Keeps the tokens of a request apart from equal tokens of other tenants."""
        return (req.extra_key, getattr(req, "cache_salt", None) or None)

    def reset(self) -> None:
        super().reset()
        self.clear_indexes()

    def clear_indexes(self) -> None:
        """Forget all donors and branches."""
        for index in (self.index, self.approximate, self.branches):
            if index is not None:
                index.clear()

    # ---- insertion

    def insert(self, params: Any) -> Any:
        params, branch = self.in_own_branch(params)
        result = super().insert(params)
        if self.index is not None and not self.breaker.open:
            try:
                self._index_path(params.key, branch)
            except Exception:
                self.breaker.failed("indexing")
                self.clear_indexes()
        return result

    def in_own_branch(self, params: Any) -> tuple[Any, Branch | None]:
        """Parameters whose key is in the branch of the request that is being inserted, and that branch or None."""
        branch = state_of(self._inserting).match.branch if self._inserting is not None else None
        if branch is not None:
            params = replace(params, key=self.in_branch(params.key, branch))
        return params, branch

    @staticmethod
    def in_branch(key: Any, branch: Branch) -> Any:
        """The key under which the tree holds a path's KV in a branch."""
        return compat.key_like(compat.namespace(key), branch.mark(compat.key_tokens(key)))

    def _index_path(self, key: Any, branch: Branch | None) -> None:
        """Index an inserted path as a donor, and its branch if it has one."""
        assert self.index is not None
        assert self.approximate is not None
        space, req = compat.namespace(key), self._inserting
        if branch is None:
            self.index.add(space, compat.key_tokens(key)[: self._donor_length()])
            return
        if len(key) <= branch.begin:
            return
        compiled = self.options.donors == "compiled"
        self.branches.add(self.hashes_of(req), len(req.origin_input_ids) if compiled else branch.begin, branch)
        if not compiled and branch.generation < GENERATIONS:
            self.approximate.add(space, branch.tokens(compat.key_tokens(key)), branch)

    def _donor_length(self) -> int | None:
        """How many tokens of the path that is being inserted are a donor; None for all of them."""
        if self.options.donors == "harvest":
            return None
        req = self._inserting
        # Only the prompt of a compiled donor is reusable, not the answer to it.
        return len(req.origin_input_ids) if req is not None and self.options_of(req).donor else 0

    def hashes_of(self, req: Any) -> Any:
        """Hashes of a prompt's beginnings, equal for requests with equal namespaces and options."""
        state = state_of(req)
        if state.prefix_hashes is None:
            options = self.options_of(req)
            seed = (self.namespace_of(req), options.selector, options.ratio, options.min_span)
            state.prefix_hashes = prefix_hashes(seed, req.origin_input_ids)
        return state.prefix_hashes

    # ---- search

    def find_spans(self, req: Any, start_pos: int) -> list[Span]:
        """Spans of exact donors in a prompt from ``start_pos`` on, and of approximate donors between them."""
        assert self.index is not None
        assert self.approximate is not None
        state, options, space = state_of(req), self.options_of(req), self.namespace_of(req)
        if state.exact_search is None:
            tokens = np.array(req.origin_input_ids, dtype=np.int32)
            state.exact_search = PromptSearch(self.index, space, tokens)
            state.approximate_search = PromptSearch(self.approximate, space, tokens)
        assert state.approximate_search is not None
        spans = state.exact_search.spans(start_pos, options.min_span, self._cached_length)
        if self.options.donors == "compiled" or not options.keep:
            return spans
        branch = state.match.branch
        generation = branch.generation if branch is not None else GENERATIONS
        others = state.approximate_search.spans(start_pos, options.min_span, self._cached_length)
        return merge_spans(
            spans, [span for span in others if generation_of(span.segment.mark) < generation], options.min_span
        )

    def donor_slots(self, plan: Plan, locks: list[Callable[[], None]]) -> list[torch.Tensor] | None:
        """The donors' slots of each span of a plan, int64 (length,) each; None if a donor is no longer in the tree.

        A missing donor is forgotten.

        Args:
            plan: what is reused.
            locks: receives functions that unlock the donors, which are locked here.
        """
        assert self.index is not None
        assert self.approximate is not None
        slots: dict[Segment, torch.Tensor] = {}
        for span in plan.spans:
            segment = span.segment
            index = self.index if segment.mark is None else self.approximate
            if segment not in slots:
                result = self._match_donor(segment)
                locks.append(compat.lock_path(self, result.last_device_node))
                slots[segment] = compat.matched_slots(self, result)
            if len(slots[segment]) < span.offset + span.length:
                index.forget(segment, len(slots[segment]))
                return None
            index.touch(segment)
        return [slots[span.segment][span.offset : span.offset + span.length] for span in plan.spans]

    def _cached_length(self, segment: Segment) -> int:
        """How many tokens of a donor's path the tree still holds."""
        return compat.matched_length(self._match_donor(segment))

    def _match_donor(self, segment: Segment) -> Any:
        """Match a donor's whole path, because matching a part of it would split a node of the tree."""
        tokens: Any = segment.path(segment.end)
        if isinstance(segment.mark, Branch):
            tokens = segment.mark.mark(tokens.astype(np.int64))
        key = compat.key_like(segment.namespace, tokens)
        return super().match_prefix(compat.match_params(key))
