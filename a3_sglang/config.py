"""Options of the server and of one request, validated once and passed on as plain values."""

from __future__ import annotations

import os
import reprlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, field_validator

from a3_sglang.selectors import selector_names

ENV_PREFIX = "A3_"
REQUEST_KEY = "a3"

Ratio = StrictFloat | StrictInt

DONOR_MODES = ("harvest", "compiled")
"""Where reusable KV may come from: what earlier requests left, or each chunk prefilled alone."""


class ServerOptions(BaseModel):
    """Options of a server; every request starts from them.

    Each field is read from the command line (``--a3-recompute-ratio``) or from the environment
    (``A3_RECOMPUTE_RATIO``), which is how they reach the processes that SGLang spawns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recompute_ratio: float = Field(0.15, ge=0, le=1, description="Share of the reused tokens that is recomputed.")
    selector: str = Field("probe", description="Rule that picks the reused tokens to recompute.")
    min_span: int = Field(32, ge=8, description="Shortest run of tokens that is reused.")
    min_reuse: int = Field(256, ge=1, description="With fewer reusable tokens a request gets a full prefill.")
    donors: Literal["harvest"] = Field("harvest", description="Where reusable KV comes from.")

    @field_validator("selector")
    @classmethod
    def _known_selector(cls, name: str) -> str:
        return known_selector(name)

    @classmethod
    def from_environment(cls) -> ServerOptions:
        """Read ``A3_*`` variables.

        Raises:
            ValueError: one line that names the option and what it accepts.
        """
        given = {name: os.environ[env_name(name)] for name in cls.model_fields if env_name(name) in os.environ}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise ValueError(_explain(error, lambda field: "--a3-" + field.replace("_", "-"))) from None


class RequestOptions(BaseModel):
    """What a request may say in ``custom_params["a3"]``; a field left out keeps the server's value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: Ratio | None = None
    selector: str | None = None
    min_span: StrictInt | None = None

    @field_validator("ratio")
    @classmethod
    def _share(cls, ratio: Ratio | None) -> Ratio | None:
        if ratio is not None and not 0 <= ratio <= 1:
            raise ValueError("must be between 0 and 1")
        return ratio

    @field_validator("selector")
    @classmethod
    def _known_selector(cls, name: str | None) -> str | None:
        return None if name is None else known_selector(name)


class Effective(BaseModel):
    """The options one request runs with."""

    model_config = ConfigDict(frozen=True)

    enabled: bool
    ratio: float
    selector: str
    min_span: int
    min_reuse: int


def env_name(option: str) -> str:
    return ENV_PREFIX + option.upper()


def known_selector(name: str) -> str:
    if name not in selector_names():
        raise ValueError(f"unknown selector {reprlib.repr(name)}; choose one of {', '.join(selector_names())}")
    return name


def resolve(server: ServerOptions, custom_params: Any) -> Effective:
    """Merge a request's ``custom_params`` into the server's options.

    Args:
        server: the options the server was started with.
        custom_params: the request's ``custom_params`` (a dict or None); only the key ``"a3"`` is read. ``False``
            turns fusion off, ``True`` is the default, a dict overrides single options.

    Raises:
        ValueError: one line that names the field and what it accepts.
    """
    given = custom_params.get(REQUEST_KEY, True) if isinstance(custom_params, dict) else True
    enabled, fields = True, RequestOptions()
    if isinstance(given, bool):
        enabled = given
    elif isinstance(given, dict):
        try:
            fields = RequestOptions.model_validate(given)
        except ValidationError as error:
            raise ValueError(_explain(error, lambda field: f"custom_params.a3.{field}")) from None
    else:
        raise ValueError(f"custom_params.a3: must be true, false or an object, not {type(given).__name__}")
    if fields.min_span is not None and fields.min_span < server.min_span:
        raise ValueError(
            f"custom_params.a3.min_span: must be at least {server.min_span}, the server's --a3-min-span "
            f"(shorter runs are not indexed), not {fields.min_span}"
        )
    return Effective(
        enabled=enabled,
        ratio=server.recompute_ratio if fields.ratio is None else float(fields.ratio),
        selector=fields.selector or server.selector,
        min_span=fields.min_span or server.min_span,
        min_reuse=server.min_reuse,
    )


def _explain(error: ValidationError, name: Any) -> str:
    """One readable line for the first problem, whatever was sent; a union's branches are folded into one."""
    problem = error.errors(include_url=False)[0]
    field = str(problem["loc"][0]) if problem["loc"] else ""
    field = field if field.isidentifier() and len(field) <= 40 else reprlib.repr(field)
    if problem["type"] == "extra_forbidden":
        known = ", ".join(RequestOptions.model_fields)
        return f"{name(field)}: unknown option; the options are {known}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name(field)}: {message} (got {reprlib.repr(problem['input'])})"


__all__ = ["Effective", "RequestOptions", "ServerOptions", "env_name", "resolve"]
