"""Options of the server and of one request, validated once and passed on as plain values."""

from __future__ import annotations

import os
import reprlib
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from a3_sglang.integration import compat
from a3_sglang.selectors import Ratio, make_selector, selector_names

ENV_PREFIX = "A3_"
BACKEND = "a3"
"""Value of ``--radix-cache-backend``."""
REQUEST_KEY = "a3"
"""Key of a request's options in ``custom_params``, and of its report."""

AUTO: Literal["auto"] = "auto"

DONOR_MODES = ("harvest", "compiled")
"""Where reusable KV may come from: what any earlier request left, or what was prefilled to be reused."""


def check_ratio(value: Any) -> Ratio:
    """A share or ``"auto"``.

    Raises:
        ValueError: it is neither.
    """
    if value == AUTO:
        return AUTO
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f'must be a number between 0 and 1, or "{AUTO}"')


def _read_ratio(value: Any) -> Ratio:
    """The same from the text of an option."""
    with suppress(TypeError, ValueError):
        value = value if value == AUTO else float(value)
    return check_ratio(value)


def _read_rows(value: Any) -> int | Literal["auto"]:
    """A number of rows or ``"auto"``, also from the text of an option.

    Raises:
        ValueError: it is neither.
    """
    if value == AUTO:
        return AUTO
    with suppress(TypeError, ValueError):
        if (rows := int(value)) >= 0:
            return rows
    raise ValueError(f'must be a whole number of rows, 0 or more, or "{AUTO}"')


def _read_arguments(value: Any) -> tuple[str, ...]:
    """Names of SGLang's server options from a comma-separated text; ``--some-option`` is read as ``some_option``.

    Raises:
        ValueError: the installed SGLang has no such option.
    """
    names = value.split(",") if isinstance(value, str) else list(value)
    names = [str(name).strip().removeprefix("--").replace("-", "_") for name in names]
    if unknown := [name for name in names if name not in compat.argument_defaults()]:
        raise ValueError(f"SGLang has no server option {reprlib.repr(unknown[0])}")
    return tuple(dict.fromkeys(names))


class ServerOptions(BaseModel):
    """Options of a server; every request starts from them.

    Each field is read from the command line (``--a3-recompute-ratio``) or from the environment
    (``A3_RECOMPUTE_RATIO``), which is how they reach the processes that SGLang spawns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["fuse", "observe"] = Field(
        "fuse",
        description="fuse: reuse KV; observe: change nothing, and tell in reports, log and metrics what would be "
        "reused.",
    )
    recompute_ratio: Annotated[Ratio, BeforeValidator(_read_ratio)] = Field(
        0.15, description='Share of the reused tokens that is recomputed, or "auto".'
    )
    selector: str = Field("probe", description="Rule that picks the reused tokens to recompute.")
    min_span: int = Field(32, ge=8, description="Shortest run of tokens that is reused.")
    min_saving: float = Field(
        1 / 3,
        ge=0,
        le=1,
        description="Share of a prompt's rows after its prefix that fusion has to save; else they are computed in "
        "full, which makes them exact. 0: fuse whenever anything can be reused.",
    )
    overhead: Annotated[int | Literal["auto"], BeforeValidator(_read_rows)] = Field(
        "auto",
        description="Rows that take as long to compute as what a fusion costs besides its own rows, which it has to "
        "save, too; auto measures them at start.",
    )
    donors: Literal["harvest", "compiled"] = Field(
        "harvest",
        description="Where reusable KV comes from: what any earlier request left (harvest), or only requests that "
        "say they are donors (compiled), so that answers do not depend on other traffic.",
    )
    row_attention: Literal["auto", "flashinfer", "triton"] = Field(
        "auto",
        description="What recomputed tokens attend with on a GPU; auto tries both at start and keeps the fastest that "
        "is right.",
    )
    allow: Annotated[tuple[str, ...], BeforeValidator(_read_arguments)] = Field(
        (),
        description="Server options of SGLang, separated by commas, that are accepted although their effect on a3 is "
        "not known.",
    )
    report: Literal["rounded", "exact"] = Field(
        "rounded",
        description="Token counts in the report of each request: rounded to 64, or exact, which tells clients how much "
        "of a guessed text is in other clients' prompts.",
    )
    explain: Literal["on", "off"] = Field(
        "off",
        description="on: requests may ask where each of their tokens came from, which tells clients what other "
        "clients' prompts hold.",
    )

    @field_validator("selector")
    @classmethod
    def _known_selector(cls, name: str, others: ValidationInfo) -> str:
        return check_combination(check_selector(name), others.data.get("recompute_ratio"))

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

    ratio: Annotated[Ratio | None, BeforeValidator(lambda value: None if value is None else check_ratio(value))] = None
    selector: str | None = None
    min_span: StrictInt | None = None
    donor: StrictBool = False
    keep: StrictBool = True
    question: tuple[StrictInt, StrictInt] | None = None
    explain: StrictBool = False

    @field_validator("question")
    @classmethod
    def _not_empty(cls, question: tuple[int, int] | None) -> tuple[int, int] | None:
        if question is not None and not 0 <= question[0] < question[1]:
            raise ValueError("must be [start, end], token positions in the prompt, with 0 <= start < end")
        return question

    @field_validator("selector")
    @classmethod
    def _known_selector(cls, name: str | None) -> str | None:
        return None if name is None else check_selector(name)


class ResolvedOptions(BaseModel):
    """The options one request runs with.

    Attributes:
        valid: what the request asked for made sense; else it is not fused.
        enabled: it may be fused.
        donor: it is prefilled in full, and what it leaves may be reused where donors are compiled.
        keep: it continues approximate KV of earlier requests and leaves its own to later ones.
        question: which of its prompt's tokens are the question, ``(start, end)``; None: that is guessed.
        explain: its report says where each token came from.
    """

    model_config = ConfigDict(frozen=True)

    valid: bool = True
    enabled: bool
    donor: bool
    keep: bool
    ratio: Ratio
    selector: str
    min_span: int
    min_saving: float
    question: tuple[int, int] | None = None
    explain: bool = False


def env_name(option: str) -> str:
    return ENV_PREFIX + option.upper()


def check_selector(name: str) -> str:
    if name not in selector_names():
        raise ValueError(f"unknown selector {reprlib.repr(name)}; choose one of {', '.join(selector_names())}")
    return name


def check_combination(selector: str, ratio: Ratio | None) -> str:
    """The selector's name, where the rule can go with this ratio.

    Raises:
        ValueError: it cannot.
    """
    measuring = [name for name in selector_names() if make_selector(name).supports_auto]
    if ratio == AUTO and selector not in measuring:
        raise ValueError(
            f'ratio "{AUTO}" needs a rule that measures attention ({", ".join(measuring)}), not {selector}'
        )
    return selector


def request_options(given: Any) -> RequestOptions:
    """Read ``custom_params["a3"]``: true, false or an object.

    Raises:
        ValueError: one line that names the field and what it accepts.
    """
    if isinstance(given, bool):
        return RequestOptions()
    if not isinstance(given, dict):
        raise ValueError(f"custom_params.a3: must be true, false or an object, not {type(given).__name__}")
    try:
        return RequestOptions.model_validate(given)
    except ValidationError as error:
        raise ValueError(_explain(error, lambda field: f"custom_params.a3.{field}")) from None


def resolve(server: ServerOptions, custom_params: Any) -> ResolvedOptions:
    """Merge a request's ``custom_params`` into the server's options.

    Args:
        server: the options the server was started with.
        custom_params: the request's ``custom_params`` (a dict or None); only the key ``"a3"`` is read. ``False``
            turns fusion off, ``True`` is the default, a dict overrides single options.

    Raises:
        ValueError: one line that names the field and what it accepts.
    """
    given = custom_params.get(REQUEST_KEY, True) if isinstance(custom_params, dict) else True
    fields = request_options(given)
    if fields.min_span is not None and fields.min_span < server.min_span:
        raise ValueError(
            f"custom_params.a3.min_span: must be at least {server.min_span}, the server's --a3-min-span "
            f"(shorter runs are not indexed), not {fields.min_span}"
        )
    if fields.explain and server.explain == "off":
        raise ValueError("custom_params.a3.explain: only a server with --a3-explain on takes it (docs/security.md)")
    ratio = server.recompute_ratio if fields.ratio is None else fields.ratio
    try:
        selector = check_combination(fields.selector or server.selector, ratio)
    except ValueError as error:
        raise ValueError(f"custom_params.a3.selector: {error}") from None
    return ResolvedOptions(
        enabled=given is not False,
        donor=fields.donor,
        keep=fields.keep,
        ratio=ratio,
        selector=selector,
        min_span=fields.min_span or server.min_span,
        min_saving=server.min_saving,
        question=fields.question,
        explain=fields.explain,
    )


def resolve_or_disable(server: ServerOptions, custom_params: Any) -> ResolvedOptions:
    """Like :func:`resolve`, for the scheduler: what a front end let through must not raise there."""
    try:
        return resolve(server, custom_params)
    except ValueError:
        return resolve(server, {REQUEST_KEY: False}).model_copy(update={"valid": False})


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


__all__ = ["RequestOptions", "ResolvedOptions", "ServerOptions", "env_name", "resolve"]
