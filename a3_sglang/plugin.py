"""Entry point of SGLang's plugin loader: registers the backend ``a3`` and the hooks it needs.

Unless the backend is selected, every hook passes its call on unchanged.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from a3_sglang.config import BACKEND, ServerOptions, env_name
from a3_sglang.integration import compat, http
from a3_sglang.integration.dumps import with_dumps
from a3_sglang.integration.support import BACKEND_OPTION, RefusedError, refusal_before_start, server_options

if TYPE_CHECKING:
    from a3_sglang.integration.radix_cache import A3RadixCache

_cache: A3RadixCache | None = None
"""The tree of this process's scheduler; None if it is not an :class:`A3RadixCache`."""


def register() -> None:
    """Called by SGLang in every process that it starts."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    compat.check()
    register_radix_cache_backend(BACKEND, _create_cache)
    compat.take_engine_arguments(_take_options)
    HookRegistry.register(compat.HOOKS["cli"], _add_options, HookType.AFTER)
    around = {
        "generate": http.generate,
        "respond": http.respond,
        "forward": with_dumps(_forward, lambda: _cache),
        "admit": _admit,
        "continue": _continue,
        "rank": _rank,
        "launch": _launch,
        "serve": _serve,
    }
    for name, hook in around.items():
        HookRegistry.register(compat.HOOKS[name], hook, HookType.AROUND)
    if compat.overwrites_arguments():
        HookRegistry.register(compat.ARGUMENTS_HOOK, compat.remember_arguments, HookType.AROUND)


# ---- options


class _ToEnvironment(argparse._StoreAction):
    """Stores an option in the environment, which the processes that SGLang spawns inherit.

    SGLang before 0.5.23 reads only options with this base class from its ``--config`` file.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        os.environ[env_name(self.dest.removeprefix("a3_"))] = str(values)
        try:
            server_options()
        except ValueError as error:
            parser.error(str(error))


def _add_options(_result: None, parser: argparse.ArgumentParser) -> None:
    """Add ``--a3-*`` to SGLang's command line."""
    group = parser.add_argument_group("a3", "KV reuse at any position (with --radix-cache-backend a3)")
    for name, field in ServerOptions.model_fields.items():
        group.add_argument(
            "--a3-" + name.replace("_", "-"),
            action=_ToEnvironment,
            metavar=name.upper(),
            default=argparse.SUPPRESS,
            help=f"{field.description} Default: {field.default or 'none'}.",
        )


_engine_variables: set[str] = set()
"""Environment variables that were set for the last ``sglang.Engine``."""


def _take_options(given: dict[str, Any]) -> dict[str, Any]:
    """Move ``a3_*`` from the arguments of ``sglang.Engine`` to the environment.

    Raises:
        TypeError: unknown option.
        ValueError: bad value.
    """
    options = {name: value for name, value in given.items() if name.startswith("a3_")}
    while _engine_variables:
        os.environ.pop(_engine_variables.pop(), None)
    for name, value in options.items():
        if name.removeprefix("a3_") not in ServerOptions.model_fields:
            known = ", ".join("a3_" + field for field in ServerOptions.model_fields)
            raise TypeError(f"sglang.Engine has no option {name}; those of a3 are {known}")
        variable = env_name(name.removeprefix("a3_"))
        os.environ[variable] = str(value)
        _engine_variables.add(variable)
    server_options()
    return {name: value for name, value in given.items() if name not in options}


# ---- start


def _launch(original: Callable[..., Any], engine: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse what cannot be served before any process is spawned."""
    if server_args.radix_cache_backend == BACKEND:
        reason = refusal_before_start(server_args)
        if reason is not None:
            raise RefusedError(f"{BACKEND_OPTION}: {reason}")
    return original(engine, server_args, *args, **kwargs)


def _serve(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Show a refusal of a server that is started from the command line as one line without a traceback."""
    try:
        return original(*args, **kwargs)
    except RefusedError as error:
        raise SystemExit(f"error: {error}") from None


# ---- the scheduler's process


def _create_cache(context: Any) -> Any:
    """Create the tree of the backend ``a3``, or stop with one readable line."""
    global _cache
    from a3_sglang.integration.radix_cache import A3RadixCache
    from a3_sglang.integration.startup import create_cache

    cache = create_cache(context)
    # In observe mode, the hooks below do nothing.
    _cache = cache if isinstance(cache, A3RadixCache) else None
    return cache


def _forward(original: Callable[..., Any], worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Run a batch; an extend runs with the fusions of its planned requests."""
    run = partial(original, worker, batch, *args, **kwargs)
    if _cache is None or batch is None or not batch.forward_mode.is_extend():
        return run()
    assert _cache.prefill is not None
    return _cache.prefill.forward(batch, run)


def _admit(original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Admit a request: the first step of its prefill."""
    if _cache is None:
        return original(adder, req, *args, **kwargs)
    if not adder.can_run_list and adder.rem_chunk_tokens is not None:
        # In a mixed chunk, decoding requests use some of the rows that the plan was made for.
        _cache.shrink_plan(req, _cache.rows_within(adder.rem_chunk_tokens))
    return _add(adder, req, partial(original, adder, req, *args, **kwargs), _cache.after_admission)


def _continue(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """Add the next step of a chunked prefill, which may reuse more tokens."""
    if _cache is None or adder.rem_chunk_tokens is None:
        return original(adder, req)
    compat.keep_computed(_cache, req)
    _cache.plan_next_step(req, _cache.rows_within(adder.rem_chunk_tokens))
    result = _add(adder, req, partial(original, adder, req), _cache.after_next_step)
    compat.log_as_cached(adder, _cache.planned_tokens(req))
    return result


def _add(adder: Any, req: Any, add: Callable[[], Any], after: Callable[[Any, bool], None]) -> Any:
    """Add a request to a step, charge the rows of its fusion to the step's budget, and notify the cache.

    The step ends at the position at which the request can reuse tokens again. The rest of the chunk is not given to
    other requests, because SGLang can track only one unfinished prefill.
    """
    assert _cache is not None
    rows, admitted, result = _cache.fusion_rows(req), False, None
    compat.take_budget(adder, rows)
    withheld = compat.limit_chunk(adder, _cache.tail_limit(req))
    try:
        result = add()
        admitted = any(other is req for other in adder.can_run_list)
    finally:
        after(req, admitted)
        compat.take_budget(adder, (_cache.fusion_rows(req) if admitted else 0) - rows)
        if not admitted or (adder.new_chunked_req is not req and result is not req):
            compat.unlimit_chunk(adder, withheld)
    if admitted:
        compat.log_as_computed(adder, req, _cache.context_rows(req))
    return result


def _rank(original: Callable[..., Any], policy: Any, waiting: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Rank waiting requests by matched tokens, without counting rows that their fusions compute as matched."""
    result = original(policy, waiting, *args, **kwargs)
    if _cache is not None:
        for req in waiting:
            req.num_matched_prefix_tokens -= _cache.context_rows(req)
    return result
