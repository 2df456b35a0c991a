"""SGLang's own tree, allocator, pool and requests, driven step by step as its scheduler drives them."""

from __future__ import annotations

import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from a3_sglang.config import ServerOptions
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.ops import TorchOps
from a3_sglang.integration import compat
from a3_sglang.integration.radix_cache import A3RadixCache
from a3_sglang.integration.request_state import state_of
from helpers.reference import Llama, Shape

SLOTS = 512
OPTIONS = ServerOptions(min_span=8, min_saving=0, report="exact")


class Cache:
    """A tree over a pool of slots, with a method for each thing that a scheduler does to it."""

    def __init__(self, page_size: int = 1, options: ServerOptions | None = None, slots: int = 0) -> None:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        slots = slots or SLOTS
        self.model = Llama(shape=Shape(positions=4096))
        shape = self.model.shape
        pool = MHATokenToKVPool(
            slots, page_size, torch.float32, shape.kv_heads, shape.head_dim, self.model.depth, "cpu", False
        )
        self.model.keys = [pool.get_key_buffer(layer) for layer in range(self.model.depth)]
        self.model.values = [pool.get_value_buffer(layer) for layer in range(self.model.depth)]
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(slots, torch.float32, "cpu", pool, False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(slots, page_size, torch.float32, "cpu", pool, False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(4, 1024, "cpu", False),
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
        )
        self.tree = type("Tree", (A3RadixCache, UnifiedRadixCache), {})(params)
        self.executor = Executor(self.model, TorchOps())
        self.tree.start(options or OPTIONS, self.executor, capacity=slots)

    def key(self, tokens: list[int]):
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(array.array("q", tokens), None)

    def donate(self, tokens: list[int]) -> None:
        """Insert the KV of a finished request."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        slots = self.allocator.alloc(len(tokens))
        assert slots is not None
        self.tree.insert(InsertParams(key=self.key(tokens), value=slots.clone()))

    def request(self, tokens: list[int], rid: str = "r", **options: Any):
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        return Req(rid, "", array.array("q", tokens), SamplingParams(custom_params={"a3": options}))

    def match(self, req) -> int:
        """Match a request; returns the tokens offered after the prefix."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        result = self.tree.match_prefix(MatchPrefixParams(key=self.key(list(req.origin_input_ids)), req=req))
        req.last_node = result.last_device_node
        return result.host_hit_length

    def slots_of(self, tokens: list[int]) -> torch.Tensor:
        """The slots of the cached prefix of these tokens."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        return compat.matched_slots(self.tree, self.tree.match_prefix(MatchPrefixParams(key=self.key(tokens))))

    def load(self, req) -> int:
        """Admit a matched request; returns the tokens that it gets after the prefix."""
        return self.tree.init_load_back(SimpleNamespace(req=req))[0]

    def fuse(self, *reqs, run: Callable[[], Any] = lambda: None) -> Any:
        """Run a batch of these requests; ``run`` replaces its extend."""
        for row, req in enumerate(reqs):
            prefix = list(req.origin_input_ids)[: state_of(req).match.plan.prefix]
            slots = torch.cat([self.slots_of(prefix), state_of(req).admission.private_slots])
            self.tree.req_to_token_pool.req_to_token[row, : len(slots)] = slots
            req.kv = SimpleNamespace(req_pool_idx=row)
        batch = SimpleNamespace(
            reqs=list(reqs),
            prefix_lens=[state_of(req).match.plan.end for req in reqs],
            # An extend that is too long to take anything along.
            extend_lens=[self.executor.slice_rows for _ in reqs],
            out_cache_loc=torch.zeros(1, dtype=torch.int64),
        )
        return self.tree.prefill.forward(batch, run)

    def evict(self, count: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.tree.evict(EvictParams(num_tokens=count))

    def all_slots_back(self) -> bool:
        """Whether all slots are available after everything was evicted."""
        self.evict(SLOTS)
        return self.allocator.available_size() == SLOTS


def private_slots(req) -> torch.Tensor:
    """The slots that the request's fusion fills."""
    return state_of(req).admission.private_slots


def tokens(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(5, 100, (count,), generator=generator).tolist()


def text(generator: torch.Generator, count: int) -> list[int]:
    """Tokens that no prompt of the tests begins with, so that they are no exact prefix by chance."""
    drawn = tokens(generator, count)
    for token, position in enumerate((0, 4, 20, 40)):
        drawn[position] = token
    return drawn
