"""What a3 adds to requests and answers in the HTTP server's process: options by header, and reports."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse

from a3_sglang.config import BACKEND, REQUEST_KEY, ServerOptions, resolve

HEADER = "x-a3"
"""Header with the options of a request, in JSON: for routes without ``custom_params``."""

_REPORTS = (REQUEST_KEY, "a3_ms")

_by_choice: ContextVar[dict[int, Any] | None] = ContextVar("a3_reports", default=None)
"""Reports of the request that is being answered, by index of the choice."""


class BadRequestError(ValueError, HTTPException):
    """A request with bad options: most routes answer a ValueError with status 400, Ollama's only an HTTPException."""

    def __init__(self, message: str) -> None:
        HTTPException.__init__(self, 400, message)

    def __str__(self) -> str:
        return self.detail


async def generate(original: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
    """Check a request's options before it is sent to the scheduler; unpack its report afterwards.

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
        # SGLang aborts a streamed request that was refused, which takes a normalized one.
        obj.normalize_batch_and_arguments()
        raise BadRequestError(str(error)) from None
    async for out in original(manager, obj, request):
        for index, single in enumerate(out if isinstance(out, list) else [out]):
            _unpack(single, index)
        yield out


def _take_header(request: Any, obj: Any) -> None:
    """Make the header's options those of the request, unless its body has some."""
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
    """SGLang carries a report as the first element of a list with one element per token."""
    meta = out.get("meta_info") if isinstance(out, dict) else None
    if not meta:
        return
    for key in _REPORTS:
        if isinstance(meta.get(key), list):
            meta[key] = next((report for report in meta[key] if report is not None), None)
    reports = _by_choice.get()
    if reports is not None and REQUEST_KEY in meta:
        reports[out.get("index", index)] = meta[REQUEST_KEY]


async def respond(original: Callable[..., Awaitable[Any]], serving: Any, request: Any, raw_request: Any) -> Any:
    """Add the report to the usage of an OpenAI answer, in a stream to that of the last chunk.

    It is ``usage["a3"]``: a report, or for several choices the list of theirs. Wraps
    ``OpenAIServingBase.handle_request``.
    """
    if serving.tokenizer_manager.server_args.radix_cache_backend != BACKEND:
        return await original(serving, request, raw_request)
    reports: dict[int, Any] = {}
    # No reset is needed: each request is answered in its own task, and so in its own context.
    _by_choice.set(reports)
    answer = await original(serving, request, raw_request)
    if isinstance(answer, StreamingResponse):
        answer.body_iterator = _with_reports(answer.body_iterator, reports)
        return answer
    if not reports or getattr(answer, "usage", None) is None:
        return answer
    body = answer.model_dump(mode="json", by_alias=True)
    body["usage"][REQUEST_KEY] = _said(reports)
    return JSONResponse(body)


async def _with_reports(lines: AsyncIterable[Any], reports: dict[int, Any]) -> AsyncIterator[Any]:
    async for line in lines:
        # The chunk with the usage of the whole answer is the one without choices.
        if reports and isinstance(line, str) and line.startswith("data: {") and '"usage"' in line:
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage") and not chunk.get("choices"):
                chunk["usage"][REQUEST_KEY] = _said(reports)
                line = f"data: {json.dumps(chunk)}\n\n"
        yield line


def _said(reports: dict[int, Any]) -> Any:
    return reports[0] if list(reports) == [0] else [reports[index] for index in sorted(reports)]
