"""Looks up names of SGLang, and says which one a release lacks."""

from __future__ import annotations

import importlib
from typing import Any

from a3_sglang.integration.engine import sglang_version

SUPPORTED = ("0.5.17", "0.5.21", "0.5.23")

HOOKS: dict[str, str] = {
    "cli": "sglang.srt.server_args.ServerArgs.add_cli_args",
    "generate": "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
    "respond": "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
    "forward": "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
    "admit": "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
    "continue": "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
    "rank": "sglang.srt.managers.schedule_policy.SchedulePolicy._compute_prefix_matches",
    "launch": "sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
    "serve": "sglang.srt.entrypoints.http_server.launch_server",
}
"""Functions of SGLang that the plugin wraps, keyed by purpose."""

_NEEDED = (
    *HOOKS.values(),
    "sglang.srt.entrypoints.engine.Engine.server_args_class",
    "sglang.srt.mem_cache.registry.register_radix_cache_backend",
    "sglang.srt.mem_cache.base_prefix_cache.MatchResult.host_hit_length",
    "sglang.srt.mem_cache.base_prefix_cache.BasePrefixCache.init_load_back",
    "sglang.srt.mem_cache.base_prefix_cache.InsertParams",
    "sglang.srt.mem_cache.base_prefix_cache.MatchPrefixParams",
    "sglang.srt.mem_cache.radix_cache.RadixKey",
    "sglang.srt.mem_cache.common.evict_from_tree_cache",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer",
    "sglang.srt.model_executor.forward_batch_info.CaptureHiddenMode",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
    "sglang.srt.model_executor.forward_batch_info.ForwardMode",
    "sglang.srt.model_executor.forward_context.forward_context",
    "sglang.srt.configs.model_config.ModelConfig.from_server_args",
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward",
    "sglang.srt.layers.radix_attention.RadixAttention",
    "sglang.srt.managers.io_struct.GenerateReqInput",
    "sglang.srt.managers.schedule_batch.FINISH_ABORT",
    "sglang.srt.plugins.hook_registry.HookRegistry.register",
)


class CompatError(RuntimeError):
    """The installed SGLang lacks a name that this package needs."""


def lookup(path: str) -> Any:
    """Resolve a dotted path: a module, then attributes.

    Raises:
        CompatError: the installed SGLang has no such object.
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
        f"a3: SGLang {sglang_version()} has no {path}; this release of a3-sglang is tested with {', '.join(SUPPORTED)}"
    )


def check() -> None:
    """Look up every name that this package needs.

    Raises:
        CompatError: a name is missing; the message has the first one.
    """
    for path in _NEEDED:
        lookup(path)


def has(path: str) -> bool:
    """Whether the installed SGLang has an object at this dotted path."""
    try:
        lookup(path)
    except CompatError:
        return False
    return True
