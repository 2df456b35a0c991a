"""SGLang's radix tree: keys, matches, insertion, locks and slots."""

from __future__ import annotations

import array
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from a3_sglang.integration.compat.lookup import has, lookup

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache as TreeBase
else:
    TreeBase = object
"""Base of the mixins that :func:`create_tree` puts in front of SGLang's tree class."""

_UNIFIED_TREE = "sglang.srt.mem_cache.registry.create_unified_radix_cache"


def create_tree(context: Any, mixin: type) -> Any:
    """The tree that SGLang would create for this TreeCacheBuildContext, with ``mixin`` in front of its class."""
    if has(_UNIFIED_TREE):
        return lookup(_UNIFIED_TREE)(context, cache_class=_tree_class(mixin))
    return _tree_class(mixin)(context.params)


def _tree_class(mixin: type) -> type:
    """The tree class of this release of SGLang, with ``mixin`` in front."""
    name = "unified_radix_cache.UnifiedRadixCache" if has(_UNIFIED_TREE) else "radix_cache.RadixCache"
    return type(f"A3{name.rpartition('.')[2]}", (mixin, lookup(f"sglang.srt.mem_cache.{name}")), {})


def tree_without_kv(mixin: type, slots: int, page_size: int) -> Any:
    """A tree with ``mixin`` in front of its class, over a pool of ``slots`` slots of two bytes each."""
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

    pool = MHATokenToKVPool(slots, page_size, torch.uint8, 1, 1, 1, "cpu", False)
    if page_size == 1:
        allocator: Any = TokenToKVPoolAllocator(slots, torch.uint8, "cpu", pool, False)
    else:
        allocator = PagedTokenToKVPoolAllocator(slots, page_size, torch.uint8, "cpu", pool, False)
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=ReqToTokenPool(1, 1, "cpu", False),
        token_to_kv_pool_allocator=allocator,
        page_size=page_size,
    )
    if has(_UNIFIED_TREE):
        from sglang.srt.mem_cache.unified_cache.components import ComponentType

        params.tree_components = (ComponentType.FULL,)
    return _tree_class(mixin)(params)


def match_params(key: Any, req: Any = None) -> Any:
    """Arguments of the tree's ``match_prefix``."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

    return MatchPrefixParams(key=key, req=req) if req is not None else MatchPrefixParams(key=key)


def insert_params(key: Any, slots: torch.Tensor, owned: int) -> Any:
    """Arguments of the tree's ``insert``; it owns the first ``owned`` slots, so it must not free them as duplicates."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams

    return InsertParams(key=key, value=slots, prev_prefix_len=owned)


def namespace(key: Any) -> Hashable:
    """The part of a RadixKey that keeps its tokens apart from equal tokens of other tenants."""
    return (key.extra_key, getattr(key, "cache_salt", None))


def key_tokens(key: Any) -> npt.NDArray[np.int64]:
    """Tokens of a RadixKey up to its limit, int64 (n,)."""
    return np.array(key.token_ids, dtype=np.int64)[: len(key)]


def key_like(key_space: Hashable, tokens: npt.NDArray[np.integer[Any]]) -> Any:
    """A RadixKey of these tokens in a namespace that :func:`namespace` returned."""
    from sglang.srt.mem_cache.radix_cache import RadixKey

    extra_key, cache_salt = cast("tuple[str | None, str | None]", key_space)
    ids = array.array("q")
    ids.frombytes(tokens.astype(np.int64).tobytes())
    if "cache_salt" in RadixKey.__slots__:
        return RadixKey(ids, extra_key, cache_salt=cache_salt)
    return RadixKey(ids, extra_key)


def matched_length(result: Any) -> int:
    """Number of tokens that a MatchResult found on the device."""
    length = getattr(result, "device_prefix_len", None)
    return len(result.device_indices) if length is None else length


def matched_slots(tree: Any, result: Any) -> torch.Tensor:
    """Slots of the tokens that a MatchResult found on the device, int64 (n,)."""
    if hasattr(result, "device_indices"):
        return result.device_indices
    return tree.path_device_indices(result.last_device_node)[: result.device_prefix_len]


def lock_path(tree: Any, node: Any) -> Callable[[], None]:
    """Protect the path to a node from eviction; returns a function that ends the protection."""
    receipt = tree.inc_lock_ref(node)
    params = receipt.to_dec_params() if hasattr(receipt, "to_dec_params") else None
    return lambda: tree.dec_lock_ref(node, params)


def load_back_result(slots: torch.Tensor, node: Any) -> tuple[Any, Any]:
    """The return value of ``init_load_back`` for slots that follow the path to ``node``."""
    # From 0.5.23 on, SGLang expects the number of slots and gets the slots from `prefix_device_indices`.
    if has("sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.load_back_is_cache_owned"):
        return len(slots), node
    return slots, node


def allocate(tree: Any, count: int) -> torch.Tensor | None:
    """Allocate ``count`` slots (a multiple of the page size), evicting if needed; None if there is no room."""
    from sglang.srt.mem_cache.common import evict_from_tree_cache

    evict_from_tree_cache(tree, count)
    return tree.token_to_kv_pool_allocator.alloc(count)
