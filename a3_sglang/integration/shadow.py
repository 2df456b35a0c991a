"""Predicts what a3 would reuse, with SGLang's tree over a pool of slots without KV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from a3_sglang.config import REQUEST_KEY, ServerOptions
from a3_sglang.integration import compat
from a3_sglang.integration.planning import PlanningRadixCache
from a3_sglang.integration.request_state import RequestState, state_of
from a3_sglang.matching.plan import Plan
from a3_sglang.reporting.metrics import Metrics
from a3_sglang.reporting.report import Outcome
from a3_sglang.selectors import Budget, make_selector
from a3_sglang.selectors.budget import typical_ratio


@dataclass
class Prompt:
    """The attributes of a request that planning reads.

    Attributes:
        origin_input_ids: tokens of the prompt.
        a3_options: value of ``custom_params["a3"]``.
        extra_key, cache_salt: keep its KV apart from that of other tenants.
        limit: prompt tokens that may come from a cache; None: all but the last.
    """

    origin_input_ids: list[int]
    a3_options: Any = True
    extra_key: str | None = None
    cache_salt: str | None = None
    limit: int | None = None
    prefix_len: int = 0
    skip_radix_cache_insert: bool = False
    session: None = None
    a3: RequestState = field(default_factory=RequestState)

    @property
    def sampling_params(self) -> Any:
        return SimpleNamespace(custom_params={REQUEST_KEY: self.a3_options}, beam_width=None)


class Shadow:
    """Predicts requests in order: :meth:`ask` what would be reused, then :meth:`keep` what the request leaves.

    Args:
        options: of the server.
        slots: tokens that the KV pool would hold.
        chunk: rows of a step.
        page_size: tokens of a page.
        line_ends: bool (vocabulary,), the tokens that end a line; None if they are unknown.
        metrics: counts failures.
        on_fuse: called with every plan that would be fused.
    """

    def __init__(
        self,
        options: ServerOptions,
        slots: int,
        chunk: int,
        page_size: int = 1,
        line_ends: Any = None,
        metrics: Metrics | None = None,
        on_fuse: Callable[[Plan], None] = lambda _plan: None,
    ) -> None:
        self._on_fuse = on_fuse
        self.tree = compat.tree_without_kv(PlanningRadixCache, slots, page_size)
        overhead = options.overhead if isinstance(options.overhead, int) else 0
        self.tree.start_planning(options, slots, chunk, overhead, metrics=metrics, line_ends=line_ends)

    def ask(self, req: Any) -> Outcome:
        """How the KV of a prompt would be obtained.

        Args:
            req: a :class:`Prompt`, or an object with its attributes.
        """
        tree, tokens = self.tree, np.asarray(req.origin_input_ids, dtype=np.int64)
        limit = len(tokens) - 1 if req.limit is None else req.limit
        key = compat.key_like(tree.namespace_of(req), tokens[:limit])
        req.prefix_len = compat.matched_length(tree.match_prefix(compat.match_params(key, req)))
        tree.start_progress(req)
        match = state_of(req).match
        while True:
            if match.plan is not None:
                self._fuse(req)
            if match.next_pos is None:
                return tree.outcome(req)
            begin = match.plan.end if match.plan is not None else req.prefix_len
            req.prefix_len = begin + tree.tail_limit(req)
            tree.plan_step(req, req.prefix_len, tree.max_rows())

    def _fuse(self, req: Any) -> None:
        match, admission = state_of(req).match, self.tree.reserve(req)
        if admission is None:
            match.plan = match.next_pos = None
            return
        # `keep` allocates the slots that the request leaves.
        self.tree.token_to_kv_pool_allocator.free(admission.private_slots)
        self.tree.enter_branch(req)
        assert match.plan is not None
        options, plan = self.tree.options_of(req), match.plan
        ratio = self.tree.ratio_of(plan, typical_ratio(options.ratio))
        recomputed = Budget.of(make_selector(options.selector), ratio, plan.reused).least
        self.tree.settle(req, plan, recomputed)
        self.tree.add_fusion(req, plan, recomputed, 0.0)
        if not options.keep:
            req.skip_radix_cache_insert = True
        self._on_fuse(plan)

    def keep(self, req: Any, tokens: Any) -> None:
        """Insert what a request leaves into the tree.

        Args:
            req: passed to :meth:`ask` before.
            tokens: of the prompt and of the answer so far, or the first ones of them.
        """
        if req.skip_radix_cache_insert:
            return
        tree, tokens = self.tree, np.asarray(tokens, dtype=np.int64)
        key = compat.key_like(tree.namespace_of(req), tokens[: len(tokens) // tree.page_size * tree.page_size])
        with tree.inserting(req):
            found = tree.match_prefix(compat.match_params(key))
            unlock = compat.lock_path(tree, found.last_device_node)
            missing = len(key) - compat.matched_length(found)
            new_slots = compat.allocate(tree, missing) if missing else torch.empty(0, dtype=torch.int64)
            unlock()
            if new_slots is not None:
                owned = compat.matched_slots(tree, found)
                slots = torch.cat([owned, new_slots.to(owned.dtype)])
                tree.insert(compat.insert_params(key, slots, len(owned)))
