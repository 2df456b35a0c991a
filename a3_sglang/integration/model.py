"""Implements the executor's model interface for a model that SGLang has loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from a3_sglang.attention.base import AttentionSpec
from a3_sglang.fusion.interface import AttentionHook, Model, StopForward, UnsupportedModelError
from a3_sglang.integration import compat
from a3_sglang.integration.model_checks import (
    attention_by_layer,
    check_backend,
    check_kv,
    check_rotation,
    check_stack,
    rotary_by_layer,
    window_of,
)
from a3_sglang.rope import RopeTable


class SGLangModel(Model):
    """A model that SGLang has loaded.

    Args:
        runner: SGLang's ModelRunner.

    Raises:
        UnsupportedModelError: its KV cannot be fused.
    """

    def __init__(self, runner: Any) -> None:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        self._runner = runner
        self._pool = pool = runner.token_to_kv_pool
        if type(pool) is not MHATokenToKVPool:
            raise UnsupportedModelError(f"the KV pool {type(pool).__name__} is not supported (only plain MHA and GQA)")
        self._attentions = attentions = attention_by_layer(runner.model)
        rotary = rotary_by_layer(runner.model)
        check_stack(runner.model)
        check_backend(attentions, runner.server_args.attention_backend)
        self.depth = len(rotary)
        self.heads = int(attentions[0].tp_q_head_num)
        self.windows = [window_of(attentions[layer]) for layer in range(self.depth)]
        self.keys = [pool.get_key_buffer(layer) for layer in range(self.depth)]
        self.values = [pool.get_value_buffer(layer) for layer in range(self.depth)]
        check_kv(self.keys[0], runner.dtype)
        tables: dict[int, RopeTable] = {}
        for module in rotary.values():
            if id(module) not in tables:
                tables[id(module)] = RopeTable(module.cos_sin_cache, module.is_neox_style)
                check_rotation(module, self.keys[0].shape[-1], self.keys[0].dtype)
        self.ropes = {layer: tables[id(module)] for layer, module in rotary.items()}

    @property
    def _layers(self) -> Any:
        """The module that owns the layers, without the model's head."""
        return self._runner.model.model

    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        self._pool.set_kv_buffer(self._attentions[layer], slots, key, value)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        with self._attention(attend), suppress(StopForward):
            self._layers(tokens, positions, compat.make_extend_batch(tokens, positions))

    @torch.no_grad()
    def extend(self, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        self._runner.model(tokens, positions, compat.make_extend_batch(tokens, positions))

    @contextmanager
    def prepending(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> Iterator[None]:
        passes, total, layers = 0, 0, self._layers
        # Models pass the stack's arguments by position or by keyword, and their names differ.
        signature = inspect.signature(type(layers).forward)
        names = list(signature.parameters)[1:4]

        def before(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            nonlocal total
            bound = signature.bind(module, *args, **kwargs)
            own_tokens, own_positions, _ = (bound.arguments[name] for name in names)
            all_tokens, all_positions = torch.cat([tokens, own_tokens]), torch.cat([positions, own_positions])
            total = len(all_tokens)
            batch = compat.make_extend_batch(all_tokens, all_positions)
            bound.arguments.update(zip(names, (all_tokens, all_positions, batch), strict=True))
            return bound.args[1:], bound.kwargs

        def after(_module: Any, _args: Any, out: Any) -> Any:
            nonlocal passes
            passes += 1
            return _without_first(out, len(tokens), total)

        hooks = []
        if len(tokens):
            hooks = [
                layers.register_forward_pre_hook(before, with_kwargs=True),
                layers.register_forward_hook(after),
            ]
        try:
            # A captured prefill graph would replay SGLang's own attention.
            with compat.eager_prefill(self._runner), self._attention(attend):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        if hooks and passes != 1:
            raise RuntimeError(f"rows to recompute went through the model {passes} times, not once")

    def _attention(self, attend: AttentionHook) -> Any:
        """A context in which the model's layers attend through ``attend``."""

        def forward(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, sinks: torch.Tensor | None
        ) -> torch.Tensor:
            heads, kv_heads, dim = layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim
            out = attend.attend(
                layer.layer_id,
                q.view(-1, heads, dim),
                k.view(-1, kv_heads, dim),
                v.view(-1, kv_heads, dim),
                AttentionSpec(layer.scaling, self.windows[layer.layer_id], layer.logit_cap, sinks),
            )
            return out.reshape(-1, heads * dim)

        runner = self._runner
        return compat.attention_override(
            compat.attention_backend(forward, runner.token_to_kv_pool, runner.req_to_token_pool)
        )


def _without_first(out: Any, count: int, total: int) -> Any:
    """The output of a stack of layers without the first ``count`` of its ``total`` rows.

    Raises:
        TypeError: it is neither a tensor of rows nor a tuple or list of them.
    """
    if isinstance(out, torch.Tensor) and len(out) == total:
        return out[count:]
    if isinstance(out, (tuple, list)):
        return type(out)(None if part is None else _without_first(part, count, total) for part in out)
    raise TypeError(f"the model's layers returned {type(out).__name__}, which is not understood")
