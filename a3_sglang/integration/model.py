"""The executor's view of a model that SGLang has loaded, and the checks that it can be fused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from a3_sglang.fusion.interface import AttentionHook, Model, StopForward, UnsupportedModelError
from a3_sglang.integration import compat
from a3_sglang.rope import RopeTable, rotate

ROTARY_CLASSES = frozenset(
    {
        "RotaryEmbedding",
        "LinearScalingRotaryEmbedding",
        "Llama3RotaryEmbedding",
        "YaRNScalingRotaryEmbedding",
    }
)
"""Rotary modules whose angle depends on the position alone."""


class SGLangModel(Model):
    """A loaded model.

    Args:
        runner: SGLang's ModelRunner.

    Raises:
        UnsupportedModelError: with the reason.
    """

    _check_key: Callable[[int, torch.Tensor], None] | None = None

    def __init__(self, runner: Any) -> None:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        self._runner = runner
        pool = runner.token_to_kv_pool
        if type(pool) is not MHATokenToKVPool:
            raise UnsupportedModelError(f"the KV pool {type(pool).__name__} is not supported (only plain MHA and GQA)")
        rotary = self._rotary = rotary_by_layer(runner.model)
        check_stack(runner.model)
        self.depth = len(rotary)
        self.heads = query_heads(runner.model)
        self.keys = [pool.get_key_buffer(layer) for layer in range(self.depth)]
        self.values = [pool.get_value_buffer(layer) for layer in range(self.depth)]
        kept = self.keys[0].dtype
        if kept not in (torch.float32, torch.float16, torch.bfloat16):
            raise UnsupportedModelError(f"KV in {kept} is not supported (only bf16, fp16 and fp32)")
        if kept != runner.dtype:
            raise UnsupportedModelError(f"KV in {kept} of a model in {runner.dtype} is not supported")
        tables: dict[int, RopeTable] = {}
        for module in rotary.values():
            if id(module) not in tables:
                tables[id(module)] = RopeTable(module.cos_sin_cache, module.is_neox_style)
                check_rotation(module, self.keys[0].shape[-1], self.keys[0].dtype)
        self.ropes = {layer: tables[id(module)] for layer, module in rotary.items()}

    @property
    def _layers(self) -> Any:
        """The module that owns the layers; SGLang's models have it below the head."""
        return self._runner.model.model

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        with self._attention(attend), suppress(StopForward):
            self._layers(tokens, positions, compat.row_batch(tokens, positions))

    @torch.no_grad()
    def extend(self, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        self._runner.model(tokens, positions, compat.row_batch(tokens, positions))

    @contextmanager
    def prepending(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> Iterator[None]:
        passes, total, layers = 0, 0, self._layers
        # Models call their stack by position or by keyword, and name its arguments as they like.
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
            batch = compat.row_batch(all_tokens, all_positions)
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
            # A graph that was captured of the prefill attends as it did then.
            with compat.eager_prefill(self._runner), self._attention(attend):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        if hooks and passes != 1:
            raise RuntimeError(f"rows to recompute went through the model {passes} times, not once")

    @contextmanager
    def checking_keys(self) -> Iterator[None]:
        """Within it every layer must attend with the keys that its rotary module returned.

        Raises:
            UnsupportedModelError: names the layer.
        """
        returned: dict[int, torch.Tensor] = {}

        def rotated(module: Any, _args: Any, out: Any) -> None:
            returned[id(module)] = out[1].detach().clone()

        def check(layer: int, key: torch.Tensor) -> None:
            expected = returned.pop(id(self._rotary[layer]), None)
            if expected is None:
                raise UnsupportedModelError(f"layer {layer} attends with keys that RoPE was not applied to")
            if not torch.equal(key.flatten(1), expected.flatten(1)):
                raise UnsupportedModelError(f"layer {layer} changes its keys after RoPE")

        hooks = [module.register_forward_hook(rotated) for module in {id(m): m for m in self._rotary.values()}.values()]
        self._check_key = check
        try:
            yield
        finally:
            self._check_key = None
            for hook in hooks:
                hook.remove()

    def _attention(self, attend: AttentionHook) -> Any:
        """A context in which the model attends through ``attend``."""

        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any) -> Any:
            if self._check_key is not None:
                self._check_key(layer.layer_id, k)
            heads, kv_heads, dim = layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim
            out = attend.attend(
                layer.layer_id,
                q.view(-1, heads, dim),
                k.view(-1, kv_heads, dim),
                v.view(-1, kv_heads, dim),
                layer.scaling,
            )
            return out.reshape(-1, heads * dim)

        runner = self._runner
        return compat.attention_override(
            compat.attention_backend(forward, runner.token_to_kv_pool, runner.req_to_token_pool)
        )


def rotary_by_layer(model: torch.nn.Module) -> dict[int, Any]:
    """The rotary module of every attention layer, by layer number from 0.

    Raises:
        UnsupportedModelError: a layer has none, one of an unknown kind, or attends in a way that is not plain
            causal attention.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        for attention in (child for child in module.children() if isinstance(child, RadixAttention)):
            rotary = getattr(module, "rotary_emb", None)
            if rotary is None:
                raise UnsupportedModelError(f"{name} attends without a rotary module of its own")
            kind = type(rotary).__name__
            if kind not in ROTARY_CLASSES:
                raise UnsupportedModelError(
                    f"RoPE of type {kind} is not supported ({', '.join(sorted(ROTARY_CLASSES))})"
                )
            if attention.sliding_window_size > -1:
                raise UnsupportedModelError(f"{name} has a sliding window of {attention.sliding_window_size} tokens")
            if attention.logit_cap:
                raise UnsupportedModelError(f"{name} caps its logits")
            kind = getattr(attention.attn_type, "value", attention.attn_type)
            if kind != "decoder":
                raise UnsupportedModelError(f"{name} attends in another way than causally ({kind})")
            encoding = getattr(attention, "pos_encoding_mode", "NONE")
            if encoding != "NONE" or getattr(attention, "use_irope", False):
                raise UnsupportedModelError(f"{name} encodes positions in its attention ({encoding})")
            if getattr(attention, "xai_temperature_len", -1) > 0:
                raise UnsupportedModelError(f"{name} scales its logits by position")
            if attention.is_cross_attention or attention.qk_head_dim != attention.v_head_dim:
                raise UnsupportedModelError(f"{name} is no plain self-attention")
            found[attention.layer_id] = rotary
    if not found or sorted(found) != list(range(len(found))):
        raise UnsupportedModelError("no plain stack of attention layers was found in the model")
    return found


def check_stack(model: torch.nn.Module) -> None:
    """Whether the model keeps its layers where passes over rows can run through them.

    Raises:
        UnsupportedModelError: it does not.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    stack = getattr(model, "model", None)
    attentions = sum(isinstance(module, RadixAttention) for module in model.modules())
    inside = sum(isinstance(module, RadixAttention) for module in stack.modules()) if stack is not None else 0
    if stack is None or inside != attentions:
        raise UnsupportedModelError(f"{type(model).__name__} does not keep its layers in one module named model")
    names = list(inspect.signature(type(stack).forward).parameters)[1:4]
    if len(names) < 3 or names[1:] != ["positions", "forward_batch"]:
        raise UnsupportedModelError(
            f"{type(stack).__name__}.forward takes ({', '.join(names)}, ...), not (input_ids, positions, forward_batch)"
        )


def _without_first(out: Any, count: int, total: int) -> Any:
    """What a stack returned, without the first ``count`` of its ``total`` rows.

    Raises:
        TypeError: it is not a tensor of rows, nor a tuple or list of such.
    """
    if isinstance(out, torch.Tensor) and len(out) == total:
        return out[count:]
    if isinstance(out, (tuple, list)):
        return type(out)(None if part is None else _without_first(part, count, total) for part in out)
    raise TypeError(f"the model's layers returned {type(out).__name__}, which is not understood")


def query_heads(model: torch.nn.Module) -> int:
    """Query heads of the first layer."""
    from sglang.srt.layers.radix_attention import RadixAttention

    return int(next(layer.tp_q_head_num for layer in model.modules() if isinstance(layer, RadixAttention)))


def check_rotation(module: Any, head_dim: int, dtype: torch.dtype, generator: torch.Generator | None = None) -> None:
    """Turn random keys with the tables and compare with the model's own rotary module at the new positions.

    Args:
        module: SGLang's rotary module.
        head_dim: dimensions of a key.
        dtype: dtype of the KV pool.
        generator: draws keys and positions; seeded by default.

    Raises:
        UnsupportedModelError: they differ by more than rounding.
    """
    table = RopeTable(module.cos_sin_cache, module.is_neox_style)
    device, reach = module.cos_sin_cache.device, module.cos_sin_cache.shape[0]
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, reach, (2, 64), generator=generator).to(device)
    raw = torch.randn(64, 1, head_dim, generator=generator).to(device=device, dtype=dtype)

    def model_rotates(at: torch.Tensor) -> torch.Tensor:
        keys = raw.clone().view(64, head_dim)
        return module(at, keys.clone(), keys)[1].view(64, 1, head_dim)

    turned = rotate(model_rotates(positions[0]), *table.turn(positions[0], positions[1]), table.neox)
    expected = model_rotates(positions[1])
    error = (turned.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    # One rounding of the stored key and one of the result.
    if not bool((error < 4 * torch.finfo(dtype).eps).all()):
        raise UnsupportedModelError(
            f"keys turned with the tables of {type(module).__name__} differ from the model's own (by {error.max():.3g})"
        )
