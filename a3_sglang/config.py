"""Options of the server and of a request, validated once and then passed as plain values."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, get_args

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

from a3_sglang.attention.registry import ROW_ATTENTION_NAMES
from a3_sglang.drift.file import AUTO_NAME
from a3_sglang.selectors import Ratio, make_selector, selector_names

ENV_PREFIX = "A3_"
BACKEND = "a3"
"""Value of ``--radix-cache-backend``."""
REQUEST_KEY = "a3"
"""Key of a request's options in ``custom_params``, and of its report."""

AUTO: Literal["auto"] = "auto"

DonorMode = Literal["harvest", "compiled"]
"""Which KV may be reused: what any earlier request left, or only what was prefilled to be reused."""
DONOR_MODES: tuple[DonorMode, ...] = get_args(DonorMode)


def check_ratio(value: Any) -> Ratio:
    """Return a ratio as a float from 0 to 1, or ``"auto"``.

    Raises:
        ValueError: it is neither.
    """
    if value == AUTO:
        return AUTO
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f'must be a number between 0 and 1, or "{AUTO}"')


def _read_ratio(value: Any) -> Ratio:
    """Parse a ratio, also from the text of an option."""
    with suppress(TypeError, ValueError):
        value = value if value == AUTO else float(value)
    return check_ratio(value)


def _read_rows(value: Any) -> int | Literal["auto"]:
    """Parse a number of rows or ``"auto"``, also from the text of an option.

    Raises:
        ValueError: it is neither.
    """
    if value == AUTO:
        return AUTO
    with suppress(TypeError, ValueError):
        if (rows := int(value)) >= 0:
            return rows
    raise ValueError(f'must be a whole number of rows, 0 or more, or "{AUTO}"')


def _read_names(value: Any) -> tuple[str, ...]:
    """Parse a comma-separated list of server options; ``--some-option`` is read as ``some_option``."""
    names = value.split(",") if isinstance(value, str) else list(value)
    return tuple(dict.fromkeys(str(name).strip().removeprefix("--").replace("-", "_") for name in names))


class ServerOptions(BaseModel):
    """Options of a server; every request starts from them.

    Each field is read from the command line (``--a3-recompute-ratio``) or from the environment
    (``A3_RECOMPUTE_RATIO``), which is how they reach the processes that SGLang spawns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["fuse", "observe"] = Field(
        "fuse",
        description="fuse: reuse KV; observe: change nothing, but show in reports, log and metrics what would be "
        "reused.",
    )
    recompute_ratio: Annotated[Ratio, BeforeValidator(_read_ratio)] = Field(
        0.15, description='Share of the reused tokens that is recomputed, or "auto".'
    )
    selector: str = Field("probe", description="Rule that picks the reused tokens to recompute.")
    min_span: int = Field(32, ge=8, description="Shortest span that is reused, in tokens.")
    min_saving: float = Field(
        1 / 3,
        ge=0,
        le=1,
        description="Share of a prompt's rows after its prefix that fusion has to save; otherwise they are all "
        "computed, which makes them exact. 0: fuse whenever anything can be reused.",
    )
    overhead: Annotated[int | Literal["auto"], BeforeValidator(_read_rows)] = Field(
        "auto",
        description="Overhead of a fusion besides its own rows, as the number of rows that take as long to compute; a "
        "fusion has to save them too. auto: measured at start.",
    )
    donors: DonorMode = Field(
        "harvest",
        description="Where reusable KV comes from: from any earlier request (harvest), or only from requests marked as "
        "donors (compiled), so that answers do not depend on other traffic.",
    )
    row_attention: str = Field(
        AUTO,
        description=f"Attention of recomputed tokens on a GPU: {', '.join(ROW_ATTENTION_NAMES)}; auto tries them at "
        "start and keeps the fastest one that is correct.",
    )
    drift: str = Field(
        AUTO_NAME,
        description="Model of the drift of reused KV: auto takes what a3-sglang calibrate has fitted to this language "
        "model, if it was run, else the default; default; or a file that it has written.",
    )
    allow: Annotated[tuple[str, ...], BeforeValidator(_read_names)] = Field(
        (),
        description="Server options of SGLang, separated by commas, that are accepted although their effect on a3 is "
        "unknown.",
    )
    report: Literal["rounded", "exact"] = Field(
        "rounded",
        description="Token counts in the report of each request: rounded to 64, or exact, which reveals to clients how "
        "much of a guessed text is in other clients' prompts.",
    )
    explain: Literal["on", "off"] = Field(
        "off",
        description="on: requests may ask where each of their tokens came from, which reveals to clients what other "
        "clients' prompts contain.",
    )

    @field_validator("selector")
    @classmethod
    def _known_selector(cls, name: str, others: ValidationInfo) -> str:
        return check_combination(check_selector(name), others.data.get("recompute_ratio"))

    @field_validator("row_attention")
    @classmethod
    def _known_row_attention(cls, name: str) -> str:
        known = (AUTO, *ROW_ATTENTION_NAMES)
        if name not in known:
            raise ValueError(f"unknown row attention {reprlib.repr(name)}; choose one of {', '.join(known)}")
        return name

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
    """Options in a request's ``custom_params["a3"]``; an omitted field keeps the server's value."""

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
        valid: False if the request's options were refused; it is then not fused.
        enabled: whether the request may be fused.
        donor: whether it is prefilled in full, so that its KV may be reused if donors are compiled.
        keep: whether it continues approximate KV of earlier requests and leaves its own to later ones.
        ratio: share of the reused tokens to recompute, or "auto".
        selector: name of the rule that picks them.
        min_span: tokens of the shortest span.
        min_saving: share of the rows after the prefix that fusion has to save.
        question: prompt positions ``(start, end)`` of the question; None: it is guessed.
        explain: whether the report says where each token came from.
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
    """The environment variable of a server option."""
    return ENV_PREFIX + option.upper()


def check_selector(name: str) -> str:
    """Return the name of a selector.

    Raises:
        ValueError: there is no such selector.
    """
    if name not in selector_names():
        raise ValueError(f"unknown selector {reprlib.repr(name)}; choose one of {', '.join(selector_names())}")
    return name


def check_combination(selector: str, ratio: Ratio | None) -> str:
    """Return the selector's name if it supports this ratio.

    Raises:
        ValueError: it does not.
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
        custom_params: the request's ``custom_params`` (a dict or None), of which only the key ``"a3"`` is read:
            ``False`` turns fusion off, ``True`` is the default, a dict overrides single options.

    Raises:
        ValueError: one line that names the field and what it accepts.
    """
    given = custom_params.get(REQUEST_KEY, True) if isinstance(custom_params, dict) else True
    fields = request_options(given)
    if fields.min_span is not None and fields.min_span < server.min_span:
        raise ValueError(
            f"custom_params.a3.min_span: must be at least {server.min_span}, the server's --a3-min-span "
            f"(shorter spans are not indexed), not {fields.min_span}"
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
    """Like :func:`resolve`, for the scheduler, in which bad options must not raise: they disable fusion."""
    try:
        return resolve(server, custom_params)
    except ValueError:
        return resolve(server, {REQUEST_KEY: False}).model_copy(update={"valid": False})


def _explain(error: ValidationError, name: Callable[[str], str]) -> str:
    """One short line about the first problem, whatever was sent; the alternatives of a union count as one problem."""
    problem = error.errors(include_url=False)[0]
    field = str(problem["loc"][0]) if problem["loc"] else ""
    field = field if field.isidentifier() and len(field) <= 40 else reprlib.repr(field)
    if problem["type"] == "extra_forbidden":
        known = ", ".join(RequestOptions.model_fields)
        return f"{name(field)}: unknown option; the options are {known}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name(field)}: {message} (got {reprlib.repr(problem['input'])})"
