"""Predicts what a3 would reuse: SGLang's tree over a pool of slots without KV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from a3_sglang.config import REQUEST_KEY, ServerOptions
from a3_sglang.integration import compat
from a3_sglang.integration.planning import PlanningRadixCache, usual
from a3_sglang.integration.request import RequestState, state_of
from a3_sglang.matching.plan import Plan
from a3_sglang.reporting.metrics import Metrics
from a3_sglang.reporting.report import Outcome
from a3_sglang.selectors import Budget, make_selector


@dataclass
class Prompt:
    """The attributes of a request that planning reads.

    Attributes:
        origin_input_ids: tokens of the prompt.
        a3_options: what ``custom_params["a3"]`` says.
        extra_key, cache_salt: keep its KV apart from that of others.
        limit: tokens that may come from a cache; None: all but the last.
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
    """Answers requests in order: :meth:`ask` says what would be reused, :meth:`keep` caches what a request leaves.

    Args:
        options: the server's.
        slots: tokens that the KV pool would hold.
        chunk: rows of a step.
        page_size: tokens of a page.
        line_ends: bool (vocabulary,), the tokens that end a line; None if that is not known.
        metrics: where failures are counted.
        on_fuse: is called with every plan that would be fused.
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
        self.tree.start_planning(options, slots, chunk, overhead, metrics, line_ends)

    def ask(self, req: Any) -> Outcome:
        """What would become of a prompt.

        Args:
            req: a :class:`Prompt`, or something with its attributes.
        """
        tree, state = self.tree, state_of(req)
        tokens = np.asarray(req.origin_input_ids, dtype=np.int64)
        limit = len(tokens) - 1 if req.limit is None else req.limit
        key = compat.key_like(tree.namespace_of(req), tokens[:limit])
        req.prefix_len = compat.matched_length(tree.match_prefix(compat.match_params(key, req)))
        tree.begin(req)
        while True:
            if state.plan is not None:
                self._fuse(req, state)
            if state.stop is None:
                return tree.outcome(req)
            begin = state.plan.end if state.plan is not None else req.prefix_len
            req.prefix_len = begin + tree.tail_of(req)
            tree.plan_step(req, state, req.prefix_len, tree.most_rows())

    def _fuse(self, req: Any, state: RequestState) -> None:
        slots = self.tree.obtain(req, state)
        if slots is None:
            state.plan = state.stop = None
            return
        # `keep` allocates the slots of what the request leaves.
        self.tree.token_to_kv_pool_allocator.free(slots)
        self.tree.enter_branch(req, state)
        assert state.plan is not None
        options, plan = self.tree.options_of(req), state.plan
        ratio = self.tree.ratio_of(plan, usual(options.ratio))
        recomputed = Budget.of(make_selector(options.selector), ratio, plan.reused).least
        self.tree.settle(state, plan, recomputed)
        self.tree.count(req, plan, recomputed, 0.0)
        if not options.keep:
            req.skip_radix_cache_insert = True
        self._on_fuse(plan)

    def keep(self, req: Any, tokens: Any) -> None:
        """Insert what a request leaves into the tree.

        Args:
            req: passed to :meth:`ask` before.
            tokens: the prompt's, followed by those of the answer so far; or a beginning of them.
        """
        if req.skip_radix_cache_insert:
            return
        tree, tokens = self.tree, np.asarray(tokens, dtype=np.int64)
        key = compat.key_like(tree.namespace_of(req), tokens[: len(tokens) // tree.page_size * tree.page_size])
        with tree.inserting(req):
            found = tree.match_prefix(compat.match_params(key))
            release = compat.locked(tree, found.last_device_node)
            missing = len(key) - compat.matched_length(found)
            slots = compat.allocate(tree, missing) if missing else torch.empty(0, dtype=torch.int64)
            release()
            if slots is not None:
                known = compat.matched_slots(tree, found)
                tree.insert(compat.insert_params(key, torch.cat([known, slots.to(known.dtype)]), len(known)))
