"""ServerArgs of the installed SGLang without a server, for a model that consists of a config only."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from a3_sglang.config import ServerOptions
from a3_sglang.integration import compat
from a3_sglang.integration.support import refusal

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}

CPU = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}
"""Arguments of a server on a CPU."""


def write_model(folder: Path, config: dict[str, Any] = LLAMA) -> str:
    """Write a model folder that has only a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@contextmanager
def plugins_loaded() -> Iterator[None]:
    """Within it, ServerArgs keep what they were given, as after SGLang loaded a3."""
    with pytest.MonkeyPatch.context() as patch:
        if compat.overwrites_arguments():
            original = ServerArgs.__post_init__
            patch.setattr(ServerArgs, "__post_init__", lambda self: compat.remember_arguments(original, self))
        yield


def resolved(model_path: str, **given: Any) -> Any:
    """Resolved ServerArgs of a server with the backend a3."""
    arguments = ServerArgs(model_path=model_path, radix_cache_backend="a3", skip_tokenizer_init=True, **given)
    compat.resolve_arguments(arguments)
    return arguments


def changed(arguments: Any, **fields: Any) -> Any:
    """A copy with other values for some fields, which SGLang does not resolve again."""
    other = copy.copy(arguments)
    if compat.overwrites_arguments():
        for name, value in fields.items():
            object.__setattr__(other, name, value)
        other._a3_given = {**arguments._a3_given, **fields}
    else:
        other._raw_input = {**arguments._raw_input, **fields}
        other._resolved_overrides = [*arguments._resolved_overrides, ("test", fields)]
    return other


def refused(arguments: Any, config: Any = None, **options: Any) -> str | None:
    """The refusal at start, if any."""
    config = compat.model_config(arguments) if config is None else config
    return refusal(arguments, config, ServerOptions.model_validate(options))
