"""Creates the tree of the backend ``a3`` after checking that the configuration can be served."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from a3_sglang.config import ServerOptions
from a3_sglang.drift.file import find_drift
from a3_sglang.fusion.executor import SLICE_ROWS, Executor
from a3_sglang.fusion.interface import UnsupportedModelError
from a3_sglang.fusion.ops import Ops, create_ops
from a3_sglang.fusion.overhead import overhead_rows
from a3_sglang.fusion.warm_up import warm_up
from a3_sglang.integration import compat
from a3_sglang.integration.model import SGLangModel
from a3_sglang.integration.observing import ObservingRadixCache
from a3_sglang.integration.radix_cache import A3RadixCache
from a3_sglang.integration.shadow import Shadow
from a3_sglang.integration.support import BACKEND_OPTION, RefusedError, refusal, server_options
from a3_sglang.reporting.metrics import Metrics
from a3_sglang.selectors import make_selector

logger = logging.getLogger(__name__)


def create_cache(context: Any) -> Any:
    """The tree for SGLang's TreeCacheBuildContext.

    Raises:
        RefusedError: the configuration is not supported; the message is one line.
    """
    options = server_options()
    reason = refusal(context.server_args, context.model_config, options)
    if reason is None and context.is_hybrid_ssm:
        reason = "models with recurrent layers are not supported"
    if reason is not None:
        raise RefusedError(f"{BACKEND_OPTION}: {reason}")
    if options.mode == "observe":
        return _create_observing(context, options)
    model, ops = _load_model(context, options)
    given = context.server_args
    model.drift, drift_source = find_drift(options.drift, given.model_path, given.revision)
    executor = Executor(model, ops, _slice_rows(context.server_args))
    overhead = _warm_up(executor, model, options)
    cache = compat.create_tree(context, A3RadixCache)
    cache.start(
        options,
        executor,
        capacity=model.keys[0].shape[0],
        overhead=overhead,
        metrics=Metrics(context.server_args),
        log_each=bool(context.server_args.log_requests),
        line_ends=line_ends(context.tp_worker.tokenizer),
    )
    logger.info(
        "a3: ready. %s, %d layers, KV in %s, RoPE checked; selector %s at ratio %s, donors %s; drift model %s; row "
        "attention by %s; a fusion costs as much as %d rows besides its own",
        type(context.tp_worker.model_runner.model).__name__,
        model.depth,
        str(model.keys[0].dtype).removeprefix("torch."),
        options.selector,
        options.recompute_ratio,
        options.donors,
        drift_source,
        type(ops.row_attention).__name__,
        overhead,
    )
    return cache


def _create_observing(context: Any, options: ServerOptions) -> Any:
    """SGLang's own tree with a shadow beside it."""
    allocator = context.params.token_to_kv_pool_allocator
    shadow = Shadow(
        options,
        allocator.size,
        _slice_rows(context.server_args),
        context.params.page_size,
        line_ends(context.tp_worker.tokenizer),
        Metrics(context.server_args, observing=True),
    )
    cache = compat.create_tree(context, ObservingRadixCache)
    cache.observe(shadow, bool(context.server_args.log_requests))
    logger.info("a3: ready. Observes what would be reused and changes nothing; %s", options)
    return cache


def _load_model(context: Any, options: ServerOptions) -> tuple[SGLangModel, Ops]:
    try:
        model = SGLangModel(context.tp_worker.model_runner)
    except UnsupportedModelError as error:
        raise RefusedError(f"{BACKEND_OPTION}: {error}") from None
    try:
        return model, create_ops(model.keys[0], model.heads, model.depth, options.row_attention)
    except ValueError as error:
        raise RefusedError(f"--a3-row-attention: {error}") from None


def _warm_up(executor: Executor, model: SGLangModel, options: ServerOptions) -> int:
    """Run everything that requests will need; returns the cost of a fusion besides its own rows, in rows."""
    selector = make_selector(options.selector)
    try:
        warm_up(executor, selector)
        if isinstance(options.overhead, int):
            return options.overhead
        return overhead_rows(executor, selector) if options.min_saving else 0
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise RefusedError(f"{BACKEND_OPTION}: fusion does not work here: {first_line}") from error


def line_ends(tokenizer: Any) -> npt.NDArray[np.bool_] | None:
    """Which tokens end a line, bool (vocabulary,); None without a tokenizer (``--skip-tokenizer-init``)."""
    if tokenizer is None:
        return None
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # A line feed in byte-level vocabularies, as a byte fallback, and as itself.
    return np.array([token is not None and token.endswith(("Ċ", "<0x0A>", "\n")) for token in tokens], np.bool_)


def _slice_rows(server_args: Any) -> int:
    """Rows per forward pass of a fusion: as many as in a prefill of SGLang, so that it needs no more memory."""
    size = server_args.chunked_prefill_size
    return size if size is not None and size > 0 else SLICE_ROWS
