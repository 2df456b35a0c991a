"""What is refused at start, from the server's arguments and the model's configuration alone."""

from __future__ import annotations

from typing import Any


class RefusedError(ValueError):
    """The backend cannot serve this configuration; the message is one line that says why."""


SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
"""RoPE types whose angle depends on the position alone, by their names in a model's config.json."""

_OFF = (None, False, "", "null", "none")

_UNSUPPORTED_ARGS: tuple[tuple[str, str], ...] = (
    ("disable_radix_cache", "--disable-radix-cache leaves no tree to reuse from; drop one of the two options"),
    ("enable_hierarchical_cache", "--enable-hierarchical-cache is not supported yet"),
    ("enable_lmcache", "--enable-lmcache is another radix cache; drop one of the two options"),
    ("enable_flexkv", "--enable-flexkv is another radix cache; drop one of the two options"),
    ("enable_unified_cache_external_linker", "an external cache linker is not supported"),
    ("enable_streaming_session", "--enable-streaming-session is not supported"),
    ("enable_dp_attention", "--enable-dp-attention is not supported"),
    ("speculative_algorithm", "speculative decoding is not supported yet"),
    ("enable_two_batch_overlap", "--enable-two-batch-overlap is not supported"),
)
_ONE_ONLY = (("tp_size", "tensor"), ("pp_size", "pipeline"), ("dcp_size", "decode context"))


def refusal(server_args: Any, model_config: Any) -> str | None:
    """One line that says why this configuration is refused; None where nothing speaks against it.

    Args:
        server_args: SGLang's ServerArgs (resolved).
        model_config: SGLang's ModelConfig.
    """
    for name, reason in _UNSUPPORTED_ARGS:
        if getattr(server_args, name, None) not in _OFF:
            return reason
    for name, kind in _ONE_ONLY:
        if (getattr(server_args, name, None) or 1) > 1:
            return f"{kind} parallelism is not supported yet (--{name.replace('_', '-')} must be 1)"
    if getattr(server_args, "disaggregation_mode", None) not in _OFF:
        return "prefill-decode disaggregation is not supported"
    kept, computed = getattr(server_args, "kv_cache_dtype", "auto"), str(model_config.dtype).removeprefix("torch.")
    if kept not in ("auto", computed) and (kept, computed) != ("bf16", "bfloat16"):
        return f"KV in {kept} of a model in {computed} is not supported yet (--kv-cache-dtype must be auto)"
    return model_refusal(model_config)


def model_refusal(model_config: Any) -> str | None:
    """The part of :func:`refusal` that concerns the model."""
    text = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    if getattr(model_config, "is_multimodal", False):
        return "multimodal models are not supported (their positions are not one number a token)"
    if getattr(getattr(model_config, "attention_arch", None), "name", "") == "MLA":
        return "multi-head latent attention (MLA) is not supported"
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True):
        return f"sliding-window attention is not supported (sliding_window={window})"
    rope = getattr(text, "rope_scaling", None) or getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
    if kind not in SUPPORTED_ROPE:
        return f"RoPE of type {kind!r} is not supported (only {', '.join(SUPPORTED_ROPE)})"
    if not getattr(model_config, "is_generation", True):
        return "embedding and reward models are not supported"
    return None
