"""What goes wrong between match and copy, on SGLang's own tree, allocator, pool and requests; no engine around them."""

from __future__ import annotations

import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Llama, Shape
from torch.testing import assert_close

from a3_sglang import seams
from a3_sglang.cache.backend import A3Tree, state_of
from a3_sglang.config import ServerOptions
from a3_sglang.fusion.device import TorchDevice
from a3_sglang.fusion.executor import Executor

# Their constructors are those of the newest SGLang.
pytestmark = pytest.mark.engine
SLOTS = 512
OPTIONS = ServerOptions(min_span=8, min_reuse=16)


class Cache:
    """A tree over a pool of ``SLOTS`` slots, with what a scheduler does to it spelled out."""

    def __init__(self, page_size: int = 1) -> None:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.model = Llama(shape=Shape(positions=4096))
        shape = self.model.shape
        pool = MHATokenToKVPool(
            SLOTS, page_size, torch.float32, shape.kv_heads, shape.head_dim, self.model.depth, "cpu", False
        )
        self.model.keys = [pool.get_key_buffer(layer) for layer in range(self.model.depth)]
        self.model.values = [pool.get_value_buffer(layer) for layer in range(self.model.depth)]
        if page_size == 1:
            self.allocator = TokenToKVPoolAllocator(SLOTS, torch.float32, "cpu", pool, False)
        else:
            self.allocator = PagedTokenToKVPoolAllocator(SLOTS, page_size, torch.float32, "cpu", pool, False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(4, 1024, "cpu", False),
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
        )
        self.tree = type("Tree", (A3Tree, UnifiedRadixCache), {})(params)
        self.executor = Executor(self.model, TorchDevice())
        self.tree.start(OPTIONS, self.executor, capacity=SLOTS)

    def key(self, tokens: list[int]):
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(array.array("q", tokens), None)

    def donate(self, tokens: list[int]) -> None:
        """What a finished request leaves."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        slots = self.allocator.alloc(len(tokens))
        assert slots is not None
        self.tree.insert(InsertParams(key=self.key(tokens), value=slots.clone()))

    def request(self, tokens: list[int], rid: str = "r", **options: Any):
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        return Req(rid, "", array.array("q", tokens), SamplingParams(custom_params={"a3": options}))

    def match(self, req) -> int:
        """Tokens offered beyond the prefix."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        result = self.tree.match_prefix(MatchPrefixParams(key=self.key(list(req.origin_input_ids)), req=req))
        req.last_node = result.last_device_node
        return result.host_hit_length

    def slots_of(self, tokens: list[int]) -> torch.Tensor:
        """Where the tree holds what it has of these tokens."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        return seams.matched_slots(self.tree, self.tree.match_prefix(MatchPrefixParams(key=self.key(tokens))))

    def load(self, req) -> int:
        """Tokens obtained."""
        return self.tree.init_load_back(SimpleNamespace(req=req))[0]

    def fuse(self, *reqs) -> None:
        """All but the extend of a batch of these requests."""
        for row, req in enumerate(reqs):
            prefix = list(req.origin_input_ids)[: state_of(req).plan.prefix]
            self.tree.req_to_token_pool.req_to_token[row, : len(prefix)] = self.slots_of(prefix)
            req.kv = SimpleNamespace(req_pool_idx=row)
        # An extend that is too long to take anything along.
        self.tree.fuse(SimpleNamespace(reqs=list(reqs), extend_lens=[self.executor.slice_rows]))

    def evict(self, count: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.tree.evict(EvictParams(num_tokens=count))

    def all_slots_back(self) -> bool:
        """Available and evictable slots are all there are."""
        self.evict(SLOTS)
        return self.allocator.available_size() == SLOTS


def tokens(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(5, 100, (count,), generator=generator).tolist()


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def test_donors_evicted_between_match_and_copy_are_a_miss(generator):
    cache = Cache()
    donor = tokens(generator, 120)
    cache.donate(donor)
    req = cache.request(tokens(generator, 10) + donor[40:] + tokens(generator, 40))
    assert cache.match(req) == 90
    cache.evict(SLOTS)
    assert cache.load(req) == 0
    assert state_of(req).reason == "the donors were evicted"
    assert cache.match(req) == 0
    assert cache.all_slots_back()


def test_the_copy_itself_cannot_evict_its_donors(generator):
    """Room for the private slots is made of what else there is, and where that is too little, there is no fusion."""
    cache = Cache()
    donor, other = tokens(generator, 200), tokens(generator, 300)
    cache.donate(donor)
    cache.donate(other)
    req = cache.request(donor[40:] + tokens(generator, 40))
    assert cache.match(req) == 160
    written = [keys.clone() for keys in cache.model.keys]
    assert cache.load(req) == 160
    cache.fuse(req)
    private = state_of(req).private
    assert len(cache.slots_of(donor)) == 200
    assert not torch.isin(private, cache.slots_of(donor)).any()
    for keys, before in zip(cache.model.keys, written, strict=True):
        untouched = torch.ones(len(keys), dtype=torch.bool)
        untouched[private] = False
        assert torch.equal(keys[untouched], before[untouched])
    cache.allocator.free(private)
    assert cache.all_slots_back()


def test_no_room_is_a_full_prefill(generator):
    cache = Cache()
    donor = tokens(generator, 300)
    cache.donate(donor)
    req = cache.request(tokens(generator, 8) + donor + tokens(generator, 40))
    assert cache.match(req) > 0
    assert cache.load(req) == 0
    assert state_of(req).reason == "no room for private slots"
    assert cache.match(cache.request(donor + tokens(generator, 4))) == 0
    assert cache.all_slots_back()


def test_an_error_in_the_copy_is_a_full_prefill(generator, monkeypatch, caplog):
    cache = Cache()
    donor = tokens(generator, 120)
    cache.donate(donor)
    prompt = donor[20:] + tokens(generator, 40)
    req = cache.request(prompt)
    assert (cache.match(req), cache.load(req)) == (100, 100)

    def fails(*_args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cache.executor, "copy", fails)
    cache.fuse(req)
    assert "could not be copied; they are recomputed" in caplog.text
    assert state_of(req).exact
    assert req.customized_info["a3"][0]["recomputed"] == 100
    exact = cache.model.prefill64(torch.tensor(prompt))
    for found, expected in zip((cache.model.keys, cache.model.values), exact, strict=False):
        for layer in range(cache.model.depth):
            assert_close(found[layer][state_of(req).private].double(), expected[layer][:100], rtol=1e-4, atol=1e-4)


def test_a_donor_may_go_to_the_next_request_of_its_batch(generator):
    """Admitted first, copied first: the second one's private slots are those that the first one copies from."""
    cache = Cache()
    donors = [tokens(generator, 150) for _ in "ab"]
    for donor in donors:
        cache.donate(donor)
    for pool in (*cache.model.keys, *cache.model.values):
        pool.normal_(generator=generator)
    held = [cache.slots_of(donor) for donor in donors]
    values = [[layer[slots].clone() for layer in cache.model.values] for slots in held]
    first, second = (
        cache.request(donor[4:] + tokens(generator, 40), rid, ratio=0.0)
        for donor, rid in zip(donors, "ab", strict=True)
    )
    assert (cache.match(first), cache.load(first)) == (146, 146)
    # Used last, so what has to go is the first one's donor.
    assert (cache.match(second), cache.load(second)) == (146, 146)
    assert torch.isin(state_of(second).private, held[0]).any()
    cache.fuse(first, second)
    for req, copied in zip((first, second), values, strict=True):
        for layer in range(cache.model.depth):
            assert torch.equal(cache.model.values[layer][state_of(req).private], copied[layer][4:])


def test_an_error_in_the_search_is_a_full_prefill(generator, monkeypatch):
    cache = Cache()
    donor = tokens(generator, 120)
    cache.donate(donor)

    def fails(*_args):
        raise RuntimeError("broken")

    monkeypatch.setattr(cache.tree.index, "find", fails)
    req = cache.request(donor[20:] + tokens(generator, 40))
    assert cache.match(req) == 0
    assert state_of(req).reason == "the search failed"


def test_an_admission_that_came_to_nothing_gives_its_slots_back(generator):
    """Matched, loaded, and matched again: the scheduler took it back before its batch ran."""
    cache = Cache()
    donor = tokens(generator, 152)
    cache.donate(donor)
    req = cache.request(donor[20:] + tokens(generator, 40))
    for _ in range(5):
        assert cache.match(req) == 132
        free = cache.allocator.available_size()
        assert cache.load(req) == 132
        assert cache.allocator.available_size() == free - 132
    # Aborted: no batch ever holds it; the next fusion of any batch lets it go.
    cache.fuse()
    assert cache.all_slots_back()


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from([1, 16]))
def test_copied_keys_are_those_of_the_donor_turned(data, page_size):
    """Random donors and evictions: what is obtained holds the donor's values at every covered position."""
    cache = Cache(page_size)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    whole = page_size * data.draw(st.integers(64 // page_size, 128 // page_size))
    donors = [tokens(generator, whole) for _ in range(3)]
    for donor in donors:
        cache.donate(donor)
    for keys, values in zip(cache.model.keys, cache.model.values, strict=True):
        keys.normal_(generator=generator)
        values.normal_(generator=generator)
    chosen = data.draw(st.permutations(range(3)))[:2]
    cut = data.draw(st.integers(1, 24))
    prompt = [t for i in chosen for t in [*tokens(generator, cut), *donors[i][cut:]]] + tokens(generator, 40)
    req = cache.request(prompt, ratio=0.0)
    offered = cache.match(req)
    cache.evict(data.draw(st.sampled_from([0, 0, whole, 2 * whole])))
    obtained = cache.load(req)
    assert obtained in (0, offered)
    if not obtained:
        assert state_of(req).reason is not None
        return
    cache.fuse(req)
    plan, private = state_of(req).plan, state_of(req).private
    assert plan.prefix % page_size == 0
    assert len(private) == plan.end - plan.prefix
    for span in plan.spans:
        path = prompt[span.start : span.end]
        donor = next(d for d in donors if d[span.offset : span.offset + span.length] == path)
        slots = cache.slots_of(donor)[span.offset : span.offset + span.length]
        mine = private[span.start - plan.prefix : span.end - plan.prefix]
        for values in cache.model.values:
            assert torch.equal(values[mine], values[slots])
