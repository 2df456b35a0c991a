"""Refusals at start, decided from the server's arguments and the model's configuration alone."""

from __future__ import annotations

import reprlib
from typing import Any

from a3_sglang.config import AUTO, BACKEND, ServerOptions
from a3_sglang.drift.file import find_drift
from a3_sglang.integration import compat
from a3_sglang.integration.allowed_args import ALLOWED, ALLOWED_VALUES, CHECKED
from a3_sglang.integration.refused_args import REFUSED, REFUSED_VARIABLES

BACKEND_OPTION = f"--radix-cache-backend {BACKEND}"
"""Start of the messages that refuse a configuration."""


class RefusedError(ValueError):
    """The backend cannot serve this configuration; the message is one line that says why."""


SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
"""RoPE types whose angle depends only on the position, by their names in a model's config.json."""

_OFF = (None, False, "", "null", "none")

# Fields whose option has another name on the command line; allowed fields are never shown.
_CLI_NAMES = {"ep_join_mode": "elastic_ep_join_mode", "ep_join_rank_offset": "elastic_ep_join_rank_offset"}

# Options that are allowed, or refused before unknown ones are looked for.
_DECIDED = ALLOWED | CHECKED | {name for feature in REFUSED for name in (*feature.switches, *feature.details)}


def server_options() -> ServerOptions:
    """a3's options from the environment, compared with what the installed SGLang has.

    Raises:
        ValueError: one line that names the option and what it accepts.
    """
    options = ServerOptions.from_environment()
    if unknown := [name for name in options.allow if name not in compat.argument_defaults()]:
        raise ValueError(f"--a3-allow: SGLang has no server option {reprlib.repr(unknown[0])}")
    return options


def refusal_before_start(server_args: Any) -> str | None:
    """The reason why a server with these arguments is refused before any process starts; None if it is not.

    Args:
        server_args: SGLang's ServerArgs; are resolved.

    Raises:
        ValueError: see :func:`server_options`.
    """
    options = server_options()
    compat.resolve_arguments(server_args)
    return refusal(server_args, compat.model_config(server_args), options)


def refusal(server_args: Any, model_config: Any, options: ServerOptions) -> str | None:
    """The reason, in one line, why this configuration is refused; None if it is not.

    Args:
        server_args: SGLang's ServerArgs, resolved.
        model_config: SGLang's ModelConfig.
        options: a3's own options.
    """
    wrong = _known_wrong(server_args) or _window_pool(model_config)
    if options.mode == "observe":
        return wrong
    return (
        wrong
        or _wrong_kv_dtype(server_args, model_config)
        or _depends_on_traffic(server_args, options)
        or _unusable_drift(server_args, options)
        or model_refusal(model_config)
        or _unknown(server_args, options)
    )


def _known_wrong(server_args: Any) -> str | None:
    """Refuse features that a3 cannot run with, whatever ``--a3-allow`` says."""
    for variable, reason in REFUSED_VARIABLES.items():
        if compat.is_set(variable):
            return f"{variable}: {reason}"
    given, known = compat.given_arguments(server_args), compat.argument_defaults()
    for feature in REFUSED:
        for name in filter(known.__contains__, feature.switches):
            off = (*_OFF, known[name])
            if given[name] not in off:
                return f"{_flag(name)}: {feature.reason}"
            if compat.resolved_argument(server_args, name) not in off:
                return f"{_flag(name)} (set by SGLang for this configuration): {feature.reason}"
        for name in filter(known.__contains__, feature.details):
            if given[name] != known[name]:
                return f"{_flag(name)}: {feature.reason}"
    return None


def _window_pool(model_config: Any) -> str | None:
    if not getattr(model_config, "is_hybrid_swa", False):
        return None
    return (
        "layers with a sliding window have a KV pool of their own, from which SGLang frees what is outside the window; "
        "add --disable-hybrid-swa-memory"
    )


def _wrong_kv_dtype(server_args: Any, model_config: Any) -> str | None:
    kept = compat.resolved_argument(server_args, "kv_cache_dtype")
    computed = str(model_config.dtype).removeprefix("torch.")
    if kept in ("auto", computed) or (kept, computed) == ("bf16", "bfloat16"):
        return None
    return f"--kv-cache-dtype: KV in {kept} of a model in {computed} is not supported yet (use auto)"


def _depends_on_traffic(server_args: Any, options: ServerOptions) -> str | None:
    """Refuse options that make answers depend on other requests although the user asked that they do not."""
    name = "enable_mixed_chunk"
    if options.donors == "compiled" and compat.resolved_argument(server_args, name) not in _OFF:
        return (
            f"{_flag(name)}: decoding requests would use up room in a fusion's step, so with compiled donors answers "
            "would depend on them; use only one of the two"
        )
    name = "enable_deterministic_inference"
    if compat.resolved_argument(server_args, name) in _OFF:
        return None
    if options.donors != "compiled":
        return f"{_flag(name)}: with harvested donors answers depend on other requests; add --a3-donors compiled"
    if options.min_saving and options.overhead == AUTO:
        return (
            f"{_flag(name)}: the overhead of a fusion is measured at start, so which prompts are fused may differ from "
            "start to start; add a number of rows, say --a3-overhead 100"
        )
    if compat.resolved_argument(server_args, "device") != "cpu" and options.row_attention == AUTO:
        return (
            f"{_flag(name)}: row attention chosen by timing may differ from start to start; add "
            "--a3-row-attention fa3, flashinfer or triton"
        )
    return None


def _unusable_drift(server_args: Any, options: ServerOptions) -> str | None:
    """Refuse a model of drift that cannot be read or was fitted to another language model."""
    try:
        find_drift(options.drift, server_args.model_path, server_args.revision)
    except ValueError as error:
        return f"--a3-drift: {error}"
    return None


def _unknown(server_args: Any, options: ServerOptions) -> str | None:
    """Refuse options whose effect on a3 is unknown, unless they were allowed by name."""
    given = compat.given_arguments(server_args)
    names = [
        name
        for name, default in compat.argument_defaults().items()
        if given[name] != default and name not in options.allow and not _known_right(name, given[name])
    ]
    if not names:
        return None
    allow = ",".join((*options.allow, *names))
    return (
        f"{', '.join(map(_flag, names))}: not known to work with a3; to use "
        f"{'it' if len(names) == 1 else 'them'} all the same, add --a3-allow {allow}"
    )


def _known_right(name: str, value: Any) -> bool:
    return name in _DECIDED or (name in ALLOWED_VALUES and ALLOWED_VALUES[name](value))


def _flag(name: str) -> str:
    """The option as written on the command line."""
    return "--" + _CLI_NAMES.get(name, name).strip("_").replace("_", "-")


def rope_types(text_config: Any) -> set[str]:
    """The model's RoPE types, as named in config.json; layers with and without a window may have different ones."""
    rope = getattr(text_config, "rope_scaling", None) or getattr(text_config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return {"default"}
    by_kind_of_layer = [part for part in rope.values() if isinstance(part, dict)]
    return {str(part.get("rope_type", part.get("type", "default"))) for part in by_kind_of_layer or [rope]}


def model_refusal(model_config: Any) -> str | None:
    """The part of :func:`refusal` that concerns the model."""
    text = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    if getattr(model_config, "is_multimodal", False):
        return "multimodal models are not supported (their positions are not one number per token)"
    if getattr(getattr(model_config, "attention_arch", None), "name", "") == "MLA":
        return "multi-head latent attention (MLA) is not supported"
    if unknown := sorted(rope_types(text) - set(SUPPORTED_ROPE)):
        return f"RoPE of type {unknown[0]!r} is not supported (only {', '.join(SUPPORTED_ROPE)})"
    if not getattr(model_config, "is_generation", True):
        return "embedding and reward models are not supported"
    return None
