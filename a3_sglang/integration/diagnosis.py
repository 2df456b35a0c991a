"""Whether SGLang and a3 can serve a model with given options, without starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from a3_sglang.integration.support import refusal_before_start


def load_model_config(model: str) -> Any:
    """SGLang's ModelConfig of a model folder or Hub id."""
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig(model_path=model)


def arguments_refusal(arguments: Sequence[str]) -> str | None:
    """Why a3 refuses to run with these command-line arguments of SGLang's server; None if it does not.

    Raises:
        SystemExit: SGLang's own parser refuses them; it has printed why.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    return refusal_before_start(prepare_server_args(list(arguments)))
