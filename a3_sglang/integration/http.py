"""What a3 adds in the HTTP server's process: request options from a header, and reports in answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse

from a3_sglang.config import BACKEND, REQUEST_KEY, ServerOptions, resolve
from a3_sglang.reporting.report import TIMINGS_KEY

HEADER = "x-a3"
"""Header with a request's options as JSON, for routes without ``custom_params``."""

_REPORT_KEYS = (REQUEST_KEY, TIMINGS_KEY)

_by_choice: ContextVar[dict[int, Any] | None] = ContextVar("a3_reports", default=None)
"""Reports of the request that is being answered, keyed by index of the choice."""


class BadRequestError(ValueError, HTTPException):
    """A request has bad options. Most routes answer a ValueError with status 400, Ollama's only an HTTPException."""

    def __init__(self, message: str) -> None:
        HTTPException.__init__(self, 400, message)

    def __str__(self) -> str:
        return self.detail


async def generate(original: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
    """Check a request's options before it is sent to the scheduler, and unpack its report afterwards.

    Wraps ``TokenizerManager.generate_request``.

    Raises:
        BadRequestError: a bad option.
    """
    if manager.server_args.radix_cache_backend != BACKEND:
        async for out in original(manager, obj, request):
            yield out
        return
    options = ServerOptions.from_environment()
    try:
        _take_header(request, obj)
        params = getattr(obj, "sampling_params", None)
        for one in params if isinstance(params, list) else [params]:
            if isinstance(one, dict):
                resolve(options, one.get("custom_params"))
    except ValueError as error:
        # SGLang aborts a streamed request that was refused, and can abort only a normalized one.
        obj.normalize_batch_and_arguments()
        raise BadRequestError(str(error)) from None
    async for out in original(manager, obj, request):
        for index, single in enumerate(out if isinstance(out, list) else [out]):
            _unpack(single, index)
        yield out


def _take_header(request: Any, obj: Any) -> None:
    """Use the header's options for a request whose body has none."""
    text = request.headers.get(HEADER) if request is not None else None
    if text is None or not hasattr(obj, "sampling_params"):
        return
    try:
        given = json.loads(text)
    except ValueError:
        raise ValueError(
            f'header {HEADER}: must be JSON, for example false or {{"ratio": 0.3}}, not {text!r}'
        ) from None
    obj.sampling_params = obj.sampling_params or {}
    for one in obj.sampling_params if isinstance(obj.sampling_params, list) else [obj.sampling_params]:
        custom = one.get("custom_params") or {}
        if isinstance(custom, dict):
            one["custom_params"] = {REQUEST_KEY: given} | custom


def _unpack(out: Any, index: int) -> None:
    """Take reports out of the lists, with one element per token, in which SGLang delivers them."""
    meta = out.get("meta_info") if isinstance(out, dict) else None
    if not meta:
        return
    for key in _REPORT_KEYS:
        if isinstance(meta.get(key), list):
            meta[key] = next((report for report in meta[key] if report is not None), None)
    reports = _by_choice.get()
    if reports is not None and REQUEST_KEY in meta:
        reports[out.get("index", index)] = meta[REQUEST_KEY]


async def respond(original: Callable[..., Awaitable[Any]], serving: Any, request: Any, raw_request: Any) -> Any:
    """Add ``usage["a3"]`` to an OpenAI answer; in a stream, to the usage in the last chunk.

    Its value is the report, or a list of reports if there are several choices. Wraps
    ``OpenAIServingBase.handle_request``.
    """
    if serving.tokenizer_manager.server_args.radix_cache_backend != BACKEND:
        return await original(serving, request, raw_request)
    reports: dict[int, Any] = {}
    # No reset is needed: each request is answered in its own task, which has its own context.
    _by_choice.set(reports)
    answer = await original(serving, request, raw_request)
    if isinstance(answer, StreamingResponse):
        answer.body_iterator = _with_reports(answer.body_iterator, reports)
        return answer
    if not reports or getattr(answer, "usage", None) is None:
        return answer
    body = answer.model_dump(mode="json", by_alias=True)
    body["usage"][REQUEST_KEY] = _merged(reports)
    return JSONResponse(body)


async def _with_reports(lines: AsyncIterable[Any], reports: dict[int, Any]) -> AsyncIterator[Any]:
    async for line in lines:
        # The chunk with the usage of the whole answer is the one without choices.
        if reports and isinstance(line, str) and line.startswith("data: {") and '"usage"' in line:
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage") and not chunk.get("choices"):
                chunk["usage"][REQUEST_KEY] = _merged(reports)
                line = f"data: {json.dumps(chunk)}\n\n"
        yield line


def _merged(reports: dict[int, Any]) -> Any:
    return reports[0] if list(reports) == [0] else [reports[index] for index in sorted(reports)]
