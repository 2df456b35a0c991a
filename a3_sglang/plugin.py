"""Entry point of SGLang's plugin loader: registers the backend ``a3`` and the hooks it needs.

Nothing here changes SGLang unless the backend is selected: every hook passes its call on as it came.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from a3_sglang.config import BACKEND, ServerOptions, env_name
from a3_sglang.integration import compat, http
from a3_sglang.integration.debug import dump_kv, dump_logits
from a3_sglang.integration.support import RefusedError, refusal, server_options

_tree: Any = None
"""The tree of this process's scheduler, where the backend is selected."""


def register() -> None:
    """Called by SGLang in every process it starts."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    compat.check()
    register_radix_cache_backend(BACKEND, _create_tree)
    HookRegistry.register(compat.HOOKS["cli"], _add_options, HookType.AFTER)
    HookRegistry.register(compat.HOOKS["generate"], http.generate, HookType.AROUND)
    HookRegistry.register(compat.HOOKS["respond"], http.respond, HookType.AROUND)
    HookRegistry.register(compat.HOOKS["forward"], _forward, HookType.AROUND)
    HookRegistry.register(compat.HOOKS["admit"], _admit, HookType.AROUND)
    HookRegistry.register(compat.HOOKS["go_on"], _go_on, HookType.AROUND)
    HookRegistry.register(compat.HOOKS["rank"], _rank, HookType.AROUND)
    HookRegistry.register(compat.HOOKS["launch"], _launch, HookType.AROUND)
    HookRegistry.register(compat.HOOKS["serve"], _serve, HookType.AROUND)
    compat.take_engine_arguments(_take_options)
    if compat.overwrites_arguments():
        HookRegistry.register(compat.ARGUMENTS_HOOK, compat.remember_arguments, HookType.AROUND)


# ---- options


class _ToEnvironment(argparse._StoreAction):
    """Options travel in the environment, which the spawned processes inherit.

    SGLang before 0.5.23 reads from its ``--config`` file only options with this base class.
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


_of_engine: set[str] = set()
"""Variables that were set by the last ``sglang.Engine``."""


def _take_options(given: dict[str, Any]) -> dict[str, Any]:
    """Move ``a3_*`` from the arguments of ``sglang.Engine`` to the environment.

    Raises:
        TypeError: there is no such option.
        ValueError: a bad value.
    """
    options = {name: value for name, value in given.items() if name.startswith("a3_")}
    while _of_engine:
        os.environ.pop(_of_engine.pop(), None)
    for name, value in options.items():
        if name.removeprefix("a3_") not in ServerOptions.model_fields:
            known = ", ".join("a3_" + field for field in ServerOptions.model_fields)
            raise TypeError(f"sglang.Engine has no option {name}; those of a3 are {known}")
        variable = env_name(name.removeprefix("a3_"))
        os.environ[variable] = str(value)
        _of_engine.add(variable)
    server_options()
    return {name: value for name, value in given.items() if name not in options}


# ---- start


def _launch(original: Callable[..., Any], engine: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse what cannot be served before any process is spawned."""
    if server_args.radix_cache_backend == BACKEND:
        options = server_options()
        compat.resolve_arguments(server_args)
        reason = refusal(server_args, compat.model_config(server_args), options)
        if reason is not None:
            raise RefusedError(f"--radix-cache-backend a3: {reason}")
    return original(engine, server_args, *args, **kwargs)


def _serve(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Where a server is started from the command line, a refusal is one line and no traceback."""
    try:
        return original(*args, **kwargs)
    except RefusedError as error:
        raise SystemExit(f"error: {error}") from None


# ---- the scheduler's process


def _create_tree(context: Any) -> Any:
    """Build the tree of the backend ``a3``, or stop with one readable line."""
    global _tree
    from a3_sglang.integration.radix_cache import A3RadixCache
    from a3_sglang.integration.startup import build_tree

    tree = build_tree(context)
    # In observe mode, batches and admissions are not touched.
    _tree = tree if isinstance(tree, A3RadixCache) else None
    return tree


def _forward(original: Callable[..., Any], worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Run a batch; the planned requests of an extend are fused on the way."""
    run = partial(original, worker, batch, *args, **kwargs)
    if _tree is None or batch is None:
        return run()
    if not batch.forward_mode.is_extend():
        result = run()
    else:
        result = _tree.forward(batch, run)
        dump_kv(_tree, batch)
    dump_logits(batch, result)
    return result


def _admit(original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Admit a request: the first step of its prefill."""
    if _tree is None:
        return original(adder, req, *args, **kwargs)
    if not adder.can_run_list and adder.rem_chunk_tokens is not None:
        # In a mixed chunk, decoding requests use up some of the room that the plan was made for.
        _tree.fit(req, _tree.rows_in(adder.rem_chunk_tokens))
    return _add(adder, req, partial(original, adder, req, *args, **kwargs), _tree.after_admission)


def _go_on(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """Add the next step of a chunked prefill, which may reuse more tokens."""
    if _tree is None or adder.rem_chunk_tokens is None:
        return original(adder, req)
    compat.keep_computed(_tree, req)
    _tree.plan_next(req, _tree.rows_in(adder.rem_chunk_tokens))
    result = _add(adder, req, partial(original, adder, req), _tree.after_next)
    compat.log_as_cached(adder, _tree.planned_of(req))
    return result


def _add(adder: Any, req: Any, add: Callable[[], Any], after: Callable[[Any, bool], None]) -> Any:
    """Add a request to a step, charge the rows of its fusion to the step's budget, and notify the tree.

    The step ends where the request can reuse tokens again. The rest of the chunk is not given to other requests,
    because SGLang can track only one unfinished prefill.
    """
    assert _tree is not None
    rows, admitted, result = _tree.rows_of(req), False, None
    compat.reserve(adder, rows)
    held = compat.hold_back(adder, _tree.tail_of(req))
    try:
        result = add()
        admitted = any(other is req for other in adder.can_run_list)
    finally:
        after(req, admitted)
        compat.reserve(adder, (_tree.rows_of(req) if admitted else 0) - rows)
        if not admitted or (adder.new_chunked_req is not req and result is not req):
            compat.give_back(adder, held)
    if admitted:
        compat.log_as_computed(adder, req, _tree.context_rows_of(req))
    return result


def _rank(original: Callable[..., Any], policy: Any, waiting: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Match the waiting requests, and do not count rows that their fusions compute as matched when they are ranked."""
    result = original(policy, waiting, *args, **kwargs)
    if _tree is not None:
        for req in waiting:
            req.num_matched_prefix_tokens -= _tree.context_rows_of(req)
    return result
