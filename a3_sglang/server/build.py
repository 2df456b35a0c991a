"""Builds the tree of the backend ``a3`` after checking that the configuration can be served."""

from __future__ import annotations

import logging
from typing import Any

from a3_sglang import seams
from a3_sglang.cache.backend import A3Tree
from a3_sglang.config import ServerOptions
from a3_sglang.fusion.device import TorchDevice, TritonDevice
from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.model import SGLangModel, UnsupportedModelError
from a3_sglang.server.support import RefusedError, refusal

logger = logging.getLogger(__name__)


def build_tree(context: Any) -> Any:
    """The tree for SGLang's ``TreeCacheBuildContext``.

    Raises:
        RefusedError: one line that says what is not supported.
    """
    reason = refusal(context.server_args, context.model_config)
    if reason is None and context.is_hybrid_swa:
        reason = "models with sliding-window attention are not supported"
    if reason is None and context.is_hybrid_ssm:
        reason = "models with recurrent layers are not supported"
    if reason is not None:
        raise RefusedError(f"--radix-cache-backend a3: {reason}")
    options = ServerOptions.from_environment()
    try:
        model = SGLangModel(context.tp_worker.model_runner)
    except UnsupportedModelError as error:
        raise RefusedError(f"--radix-cache-backend a3: {error}") from None
    tree = seams.create_tree(context, A3Tree)
    device = TritonDevice() if model.keys[0].is_cuda else TorchDevice()
    tree.start(options, Executor(model, device), capacity=model.keys[0].shape[0])
    logger.info("a3: %s, %d layers, %s, %s", type(tree).__name__, model.depth, type(device).__name__, options)
    return tree
