"""Builds the tree of the backend ``a3`` after checking that the configuration can be served."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from a3_sglang.config import ServerOptions
from a3_sglang.fusion.executor import SLICE_ROWS, Executor
from a3_sglang.fusion.interface import UnsupportedModelError
from a3_sglang.fusion.ops import create_ops
from a3_sglang.fusion.overhead import overhead_rows
from a3_sglang.fusion.warm_up import warm_up
from a3_sglang.integration import compat
from a3_sglang.integration.model import SGLangModel
from a3_sglang.integration.observe import ObservingRadixCache
from a3_sglang.integration.radix_cache import A3RadixCache
from a3_sglang.integration.shadow import Shadow
from a3_sglang.integration.support import RefusedError, refusal
from a3_sglang.reporting.metrics import Metrics
from a3_sglang.selectors import make_selector

logger = logging.getLogger(__name__)


def build_tree(context: Any) -> Any:
    """The tree for SGLang's ``TreeCacheBuildContext``.

    Raises:
        RefusedError: one line that says what is not supported.
    """
    options = ServerOptions.from_environment()
    reason = refusal(context.server_args, context.model_config, options)
    if reason is None and context.is_hybrid_swa:
        reason = "models with sliding-window attention are not supported"
    if reason is None and context.is_hybrid_ssm:
        reason = "models with recurrent layers are not supported"
    if reason is not None:
        raise RefusedError(f"--radix-cache-backend a3: {reason}")
    if options.mode == "observe":
        return _observing(context, options)
    try:
        model = SGLangModel(context.tp_worker.model_runner)
    except UnsupportedModelError as error:
        raise RefusedError(f"--radix-cache-backend a3: {error}") from None
    try:
        device = create_ops(model.keys[0], model.heads, model.depth, options.row_attention)
    except ValueError as error:
        raise RefusedError(f"--a3-row-attention: {error}") from None
    executor = Executor(model, device, _slice_rows(context.server_args))
    try:
        with model.checking_keys():
            warm_up(executor, make_selector(options.selector))
        overhead = _overhead(executor, options)
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise RefusedError(f"--radix-cache-backend a3: fusion does not work here: {first_line}") from error
    tree = compat.create_tree(context, A3RadixCache)
    tree.start(
        options,
        executor,
        capacity=model.keys[0].shape[0],
        overhead=overhead,
        metrics=Metrics(context.server_args),
        log_each=bool(context.server_args.log_requests),
        line_ends=line_ends(context.tp_worker.tokenizer),
    )
    logger.info(
        "a3: ready. %s, %d layers, KV in %s, RoPE checked; selector %s at ratio %s, donors %s; rows attend by %s; a "
        "fusion costs as much as %d rows besides its own",
        type(context.tp_worker.model_runner.model).__name__,
        model.depth,
        str(model.keys[0].dtype).removeprefix("torch."),
        options.selector,
        options.recompute_ratio,
        options.donors,
        type(device.rows).__name__,
        overhead,
    )
    return tree


def _observing(context: Any, options: ServerOptions) -> Any:
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
    tree = compat.create_tree(context, ObservingRadixCache)
    tree.observe(shadow, bool(context.server_args.log_requests))
    logger.info("a3: ready. Observes what would be reused and changes nothing; %s", options)
    return tree


def _overhead(executor: Executor, options: ServerOptions) -> int:
    """Rows that a fusion has to save before it saves any time."""
    if isinstance(options.overhead, int):
        return options.overhead
    return overhead_rows(executor, make_selector(options.selector)) if options.min_saving else 0


def line_ends(tokenizer: Any) -> npt.NDArray[np.bool_] | None:
    """Which tokens end a line, bool (vocabulary,); None without a tokenizer (``--skip-tokenizer-init``)."""
    if tokenizer is None:
        return None
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # How byte-level vocabularies, byte fallbacks and plain ones write a line feed.
    return np.array([token is not None and token.endswith(("Ċ", "<0x0A>", "\n")) for token in tokens], np.bool_)


def _slice_rows(server_args: Any) -> int:
    """A pass of the fusion needs no more room than one of SGLang's prefills."""
    size = server_args.chunked_prefill_size
    return size if size is not None and size > 0 else SLICE_ROWS
