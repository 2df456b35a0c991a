"""SGLang's server arguments: what was given, what it resolved them to, and their defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

from a3_sglang.integration.compat.lookup import lookup


def take_engine_arguments(take: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Pass the keyword arguments of ``sglang.Engine`` through ``take`` before SGLang makes ServerArgs of them."""
    engine = lookup("sglang.srt.entrypoints.engine.Engine")
    create = engine.server_args_class
    engine.server_args_class = staticmethod(lambda **given: create(**take(given)))


ARGUMENTS_HOOK = "sglang.srt.server_args.ServerArgs.__post_init__"
"""The function that :func:`remember_arguments` wraps, in releases that :func:`overwrites_arguments`."""


@cache
def argument_defaults() -> dict[str, Any]:
    """The declared default of every field of ServerArgs; None for a required field."""
    import msgspec
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
    """Whether ServerArgs replaces given values by resolved ones when it is created, as before 0.5.21."""
    from sglang.srt.server_args import ServerArgs

    return not hasattr(ServerArgs, "resolve_once")


def remember_arguments(original: Callable[..., None], server_args: Any) -> None:
    """Hook around :data:`ARGUMENTS_HOOK`: save the given values before they are replaced."""
    server_args._a3_given = {name: getattr(server_args, name) for name in argument_defaults()}
    original(server_args)


def resolve_arguments(server_args: Any) -> None:
    """Let SGLang fill in what was not given, if it has not done so yet."""
    if not overwrites_arguments():
        server_args.resolve_once()


def given_arguments(server_args: Any) -> dict[str, Any]:
    """Every field as it was given; its default if SGLang filled it in.

    Args:
        server_args: resolved.
    """
    if not overwrites_arguments():
        return dict(server_args._raw_input)
    if hasattr(server_args, "_a3_given"):
        return dict(server_args._a3_given)
    # These ServerArgs were created before the plugin was loaded. A value that SGLang fills in for this model by itself
    # counts as not given.
    given = {name: getattr(server_args, name) for name in argument_defaults()}
    plain = type(server_args)(**{name: given[name] for name in ("model_path", "device", "quantization")})
    return {
        name: default if given[name] == getattr(plain, name) else given[name]
        for name, default in argument_defaults().items()
    }


def resolved_argument(server_args: Any, name: str) -> Any:
    """The value of a field that SGLang runs with.

    Args:
        server_args: resolved.
        name: a field of this release.
    """
    if overwrites_arguments():
        return getattr(server_args, name)
    from sglang.srt.arg_groups.overrides import resolution_result

    return resolution_result(server_args, name)


def is_set(variable: str) -> bool:
    """Whether this release of SGLang has the environment variable, and it is switched on."""
    from sglang.srt.environ import envs

    return hasattr(envs, variable) and bool(getattr(envs, variable).get())


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig for these ServerArgs."""
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig.from_server_args(server_args)
