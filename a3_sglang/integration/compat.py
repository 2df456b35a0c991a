"""Every name of SGLang that changes between releases, in one place.

:func:`check` looks each of them up at load and names what is missing, since SGLang itself logs a plugin's errors
and goes on. The rest of the package asks this module instead of SGLang.
"""

from __future__ import annotations

import array
import dataclasses
import importlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import sglang
import torch

SUPPORTED = ("0.5.17", "0.5.21", "0.5.23")

HOOKS: dict[str, str] = {
    "cli": "sglang.srt.server_args.ServerArgs.add_cli_args",
    "generate": "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
    "respond": "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
    "forward": "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
    "admit": "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
    "go_on": "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
    "rank": "sglang.srt.managers.schedule_policy.SchedulePolicy._compute_prefix_matches",
    "launch": "sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
    "serve": "sglang.srt.entrypoints.http_server.launch_server",
}
"""Functions of SGLang that are wrapped, by what they are wrapped for."""

_NEEDED = (
    *HOOKS.values(),
    "sglang.srt.entrypoints.engine.Engine.server_args_class",
    "sglang.srt.mem_cache.registry.register_radix_cache_backend",
    "sglang.srt.mem_cache.registry.default_radix_cache_factory",
    "sglang.srt.mem_cache.base_prefix_cache.MatchResult.host_hit_length",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.init_load_back",
    "sglang.srt.mem_cache.common.evict_from_tree_cache",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
    "sglang.srt.model_executor.forward_context.forward_context",
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward",
    "sglang.srt.plugins.hook_registry.HookRegistry.register",
)


class CompatError(RuntimeError):
    """SGLang lacks something this package builds on."""


def lookup(path: str) -> Any:
    """The object behind a dotted path: a module, then attributes.

    Raises:
        CompatError: it does not exist in the installed SGLang.
    """
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            for name in parts[cut:]:
                found = getattr(found, name)
        except AttributeError:
            break
        return found
    raise CompatError(
        f"a3: SGLang {sglang.__version__} has no {path}; this release of a3-sglang is tested with "
        f"{', '.join(SUPPORTED)}"
    )


def check() -> None:
    """Look every seam up.

    Raises:
        CompatError: names the first one that is missing.
    """
    for path in _NEEDED:
        lookup(path)


def _has(path: str) -> bool:
    try:
        lookup(path)
    except CompatError:
        return False
    return True


# ---- options


def take_engine_arguments(take: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Pass the keyword arguments of ``sglang.Engine`` through ``take`` before they become ServerArgs."""
    engine = lookup("sglang.srt.entrypoints.engine.Engine")
    create = engine.server_args_class
    engine.server_args_class = staticmethod(lambda **given: create(**take(given)))


# ---- the tree


def create_tree(context: Any, mixin: type) -> Any:
    """The tree SGLang would build for this context, with ``mixin`` in front of its class."""
    if _has_unified_tree():
        create = lookup(_UNIFIED_TREE)
        return create(context, cache_class=_tree_class(mixin))
    return _tree_class(mixin)(context.params)


_UNIFIED_TREE = "sglang.srt.mem_cache.registry.create_unified_radix_cache"


def _has_unified_tree() -> bool:
    return _has(_UNIFIED_TREE)


def _tree_class(mixin: type) -> type:
    """SGLang's tree class of this release, with ``mixin`` in front."""
    name = "unified_radix_cache.UnifiedRadixCache" if _has_unified_tree() else "radix_cache.RadixCache"
    return type(f"A3{name.rpartition('.')[2]}", (mixin, lookup(f"sglang.srt.mem_cache.{name}")), {})


def tree_without_kv(mixin: type, slots: int, page_size: int) -> Any:
    """A tree with ``mixin`` in front of its class, over a pool whose slots hold next to nothing."""
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
    if _has_unified_tree():
        from sglang.srt.mem_cache.unified_cache.components import ComponentType

        params.tree_components = (ComponentType.FULL,)
    return _tree_class(mixin)(params)


def match_params(key: Any, req: Any = None) -> Any:
    """What ``match_prefix`` takes."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

    return MatchPrefixParams(key=key, req=req) if req is not None else MatchPrefixParams(key=key)


def insert_params(key: Any, slots: torch.Tensor, known: int) -> Any:
    """What ``insert`` takes; the first ``known`` slots are the tree's own, which it must not free as duplicates."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams

    return InsertParams(key=key, value=slots, prev_prefix_len=known)


def namespace(key: Any) -> Hashable:
    """What keeps a key's tokens apart from equal tokens of others."""
    return (key.extra_key, getattr(key, "cache_salt", None))


def key_tokens(key: Any) -> npt.NDArray[np.int64]:
    """Tokens of a RadixKey, its cap honoured, int64 (n,)."""
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
    """Tokens a MatchResult found on the device."""
    length = getattr(result, "device_prefix_len", None)
    return len(result.device_indices) if length is None else length


def matched_slots(tree: Any, result: Any) -> torch.Tensor:
    """Slots of what a MatchResult found on the device, int64 (n,)."""
    if hasattr(result, "device_indices"):
        return result.device_indices
    return tree.path_device_indices(result.last_device_node)[: result.device_prefix_len]


def locked(tree: Any, node: Any) -> Callable[[], None]:
    """Protect a node's path from eviction; the returned function lets it go."""
    receipt = tree.inc_lock_ref(node)
    params = receipt.to_dec_params() if hasattr(receipt, "to_dec_params") else None
    return lambda: tree.dec_lock_ref(node, params)


def loaded(slots: torch.Tensor, node: Any) -> tuple[Any, Any]:
    """What ``init_load_back`` returns for slots that follow ``node``'s path."""
    if _counts_loaded_tokens():
        return len(slots), node
    return slots, node


def _counts_loaded_tokens() -> bool:
    return _has("sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.load_back_is_cache_owned")


def allocate(tree: Any, count: int) -> torch.Tensor | None:
    """``count`` free slots (a multiple of the page size), evicting where needed; None where there is no room."""
    from sglang.srt.mem_cache.common import evict_from_tree_cache

    evict_from_tree_cache(tree, count)
    return tree.token_to_kv_pool_allocator.alloc(count)


# ---- the request


def prefix_length(req: Any) -> int:
    """Tokens of a request that are not computed by its next extend."""
    return req.prefix_len if hasattr(req, "prefix_len") else len(req.prefix_indices)


def protect(req: Any, length: int) -> None:
    """Only the first ``length`` slots of the request belong to the tree."""
    if hasattr(req, "cache_protected_len"):
        req.cache_protected_len = length
    elif req.kv is not None:
        req.kv.cache_protected_len = length


def extend_prefix(tree: Any, req: Any, slots: torch.Tensor) -> None:
    """Append slots to the prefix of a request between two chunks of its prefill."""
    if hasattr(req, "prefix_len"):
        end = req.prefix_len + len(slots)
        row(tree, req)[req.prefix_len : end] = slots
        req.prefix_len = end
    else:
        req.prefix_indices = torch.cat([req.prefix_indices, slots.to(req.prefix_indices.dtype)])


def keep_computed(tree: Any, req: Any) -> None:
    """Make what a request's chunks have computed its prefix.

    Before 0.5.23, SGLang forgets it if the request must not be inserted; its next chunk would compute it again.
    """
    if hasattr(req, "prefix_len") or not req.skip_radix_cache_insert:
        return
    computed = (req if hasattr(req, "kv_committed_len") else req.kv).kv_committed_len
    if computed > len(req.prefix_indices):
        req.prefix_indices = row(tree, req)[:computed].to(req.prefix_indices.dtype, copy=True)


def shorten_prefix(req: Any, length: int) -> None:
    """Take back :func:`extend_prefix`."""
    if hasattr(req, "prefix_len"):
        req.prefix_len = length
    else:
        req.prefix_indices = req.prefix_indices[:length]


def reserve(adder: Any, rows: int) -> None:
    """Count rows that a step computes besides its extends towards what it may compute; negative: give back."""
    adder.rem_input_tokens -= rows
    if adder.rem_chunk_tokens is not None:
        adder.rem_chunk_tokens -= rows


def hold_back(adder: Any, left: int | None) -> int:
    """Limit what is left of a step's chunk to ``left`` tokens (None: no limit); returns how many were held back."""
    if left is None or adder.rem_chunk_tokens is None:
        return 0
    held: int = max(adder.rem_chunk_tokens - left, 0)
    adder.rem_chunk_tokens -= held
    return held


def give_back(adder: Any, held: int) -> None:
    """Undo :func:`hold_back`."""
    if held:
        adder.rem_chunk_tokens += held


def log_as_cached(adder: Any, tokens: int) -> None:
    """In the scheduler's log and metrics, count tokens that became part of a prefix between two chunks."""
    adder.log_hit_tokens += tokens


def log_as_computed(adder: Any, req: Any, rows: int) -> None:
    """In the scheduler's log and metrics, count rows of an admitted request as computed instead of cached."""
    adder.log_hit_tokens -= rows
    adder.log_input_tokens += rows
    if req.retracted_stain:
        adder.reprocessed_log_hit_tokens -= rows
        adder.reprocessed_log_input_tokens += rows


def count_as_computed(req: Any, rows: int) -> None:
    """Rows between a request's prefix and its tail that were computed; what is left came from the device.

    SGLang has counted all of them as cached, and those of the first step as loaded from the host.
    """
    if req.retracted_stain:
        return
    req.cached_tokens -= rows
    req.cached_tokens_device, req.cached_tokens_host = req.cached_tokens, 0


def row(tree: Any, req: Any) -> torch.Tensor:
    """The request's row of slots in the pool."""
    index = req.req_pool_idx if hasattr(req, "req_pool_idx") else req.kv.req_pool_idx
    return tree.req_to_token_pool.req_to_token[index]


def attach(req: Any, name: str, value: Any) -> None:
    """Make a value part of the request's ``meta_info``; SGLang carries it as the first element of a list."""
    req.customized_info = {**(req.customized_info or {}), name: [value]}


def abort(req: Any, message: str) -> None:
    """End a request with an error after its next forward, and keep its KV out of the tree."""
    from http import HTTPStatus

    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    req.skip_radix_cache_insert = True
    req.to_finish = FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


# ---- the server's arguments

ARGUMENTS_HOOK = "sglang.srt.server_args.ServerArgs.__post_init__"
"""Where :func:`remember_arguments` goes in releases that :func:`overwrites_arguments`."""


@cache
def argument_defaults() -> dict[str, Any]:
    """The declared default of every field of ServerArgs; None for a field that has to be given."""
    from sglang.srt.server_args import ServerArgs

    struct = not dataclasses.is_dataclass(ServerArgs)
    missing: Any = msgspec.NODEFAULT if struct else dataclasses.MISSING
    fields: Any = msgspec.structs.fields(ServerArgs) if struct else dataclasses.fields(ServerArgs)
    defaults: dict[str, Any] = {}
    for field in fields:
        made = field.default if field.default_factory is missing else field.default_factory()
        defaults[field.name] = None if made is missing else made
    return defaults


def overwrites_arguments() -> bool:
    """Releases before 0.5.21 write what they resolve over what was given, as soon as ServerArgs is made."""
    from sglang.srt.server_args import ServerArgs

    return not hasattr(ServerArgs, "resolve_once")


def remember_arguments(original: Callable[..., None], server_args: Any) -> None:
    """Hook around :data:`ARGUMENTS_HOOK`: keep what was given before it is overwritten."""
    server_args._a3_given = {name: getattr(server_args, name) for name in argument_defaults()}
    original(server_args)


def resolve_arguments(server_args: Any) -> None:
    """Let SGLang fill in what was not given, where it has not yet."""
    if not overwrites_arguments():
        server_args.resolve_once()


def given_arguments(server_args: Any) -> dict[str, Any]:
    """Every field as it was given, the default for what SGLang filled in by itself.

    Args:
        server_args: resolved.
    """
    if not overwrites_arguments():
        return dict(server_args._raw_input)
    if hasattr(server_args, "_a3_given"):
        return dict(server_args._a3_given)
    # Made before plugins were loaded: what SGLang fills in for this model anyway was not given.
    given = {name: getattr(server_args, name) for name in argument_defaults()}
    plain = type(server_args)(**{name: given[name] for name in ("model_path", "device", "quantization")})
    return {
        name: default if given[name] == getattr(plain, name) else given[name]
        for name, default in argument_defaults().items()
    }


def resolved_argument(server_args: Any, name: str) -> Any:
    """A field as SGLang runs with it.

    Args:
        server_args: resolved.
        name: a field of this release.
    """
    if overwrites_arguments():
        return getattr(server_args, name)
    from sglang.srt.arg_groups.overrides import resolution_result

    return resolution_result(server_args, name)


def rust_server() -> bool:
    """Whether requests are taken by SGLang's server in Rust, which is chosen in the environment alone."""
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_RUST_SERVER.get()) if hasattr(envs, "SGLANG_RUST_SERVER") else False


# ---- the model


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig for these arguments."""
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig.from_server_args(server_args)


def row_batch(tokens: torch.Tensor, positions: torch.Tensor) -> Any:
    """A ForwardBatch for rows whose attention is not SGLang's: one pretended request, already planned."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode

    count, device = len(tokens), tokens.device
    one = torch.tensor([count], dtype=torch.int64, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=tokens,
        req_pool_indices=zero,
        seq_lens=one,
        out_cache_loc=torch.zeros(count, dtype=torch.int64, device=device),
        seq_lens_sum=count,
    )
    batch.positions = positions
    batch.seq_lens_cpu = one.cpu()
    batch.extend_num_tokens = count
    batch.extend_seq_lens, batch.extend_prefix_lens, batch.extend_start_loc = one, zero, zero
    batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = [count], [0]
    batch.extend_logprob_start_lens_cpu = [0]
    batch.capture_hidden_mode = CaptureHiddenMode.NULL
    if hasattr(batch, "mark_forward_metadata_ready"):
        batch.mark_forward_metadata_ready()
    return batch


def attention_backend(forward: Callable[..., torch.Tensor], pool: Any, rows: Any) -> Any:
    """An SGLang attention backend whose every call goes to ``forward(q, k, v, layer)``.

    An argument of attention that is not known here (sinks, say) would change what attention means, so it is an error.
    """
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    def call(
        self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True, **unknown: Any
    ) -> Any:
        given = sorted(name for name, value in unknown.items() if value is not None)
        if given:
            raise TypeError(f"layer {layer.layer_id} attends with {', '.join(given)}, which a3 does not know")
        return forward(q, k, v, layer)

    cls: Any = type(
        "A3Attention", (AttentionBackend,), {"forward": call, "init_forward_metadata": lambda *_, **__: None}
    )
    backend = object.__new__(cls)
    backend.token_to_kv_pool, backend.req_to_token_pool = pool, rows
    return backend


@contextmanager
def eager_prefill(runner: Any) -> Iterator[None]:
    """Within it an extend runs the model's own code, whatever was captured of it as a CUDA graph."""
    captured = runner.prefill_cuda_graph_runner
    runner.prefill_cuda_graph_runner = None
    try:
        yield
    finally:
        runner.prefill_cuda_graph_runner = captured


def attention_override(backend: Any) -> Any:
    """A context in which the model attends through ``backend``."""
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    return forward_context(ForwardContext(attn_backend=backend))
