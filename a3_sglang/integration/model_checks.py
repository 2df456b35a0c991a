"""Checks that a loaded model computes KV in a way that can be moved and recomputed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from a3_sglang.fusion.interface import UnsupportedModelError
from a3_sglang.rope import RopeTable, rotate

ROTARY_CLASSES = frozenset(
    {
        "RotaryEmbedding",
        "LinearScalingRotaryEmbedding",
        "Llama3RotaryEmbedding",
        "YaRNScalingRotaryEmbedding",
    }
)
"""Rotary modules whose angles depend only on the position."""


KV_DTYPES = {"cpu": (torch.bfloat16, torch.float16, torch.float32), "cuda": (torch.bfloat16, torch.float16)}
"""By type of device. In float32 the kernels for GPUs would keep their operands in slow memory."""


def check_kv(keys: torch.Tensor, dtype: torch.dtype) -> None:
    """Check that the KV pools can be read and written.

    Args:
        keys: the pool of a layer's keys.
        dtype: of the model.

    Raises:
        UnsupportedModelError: they cannot.
    """
    if keys.ndim != 3:
        raise UnsupportedModelError(
            f"a KV pool with {keys.ndim} dimensions is not supported (only slots, heads, head_dim: "
            "unset SGLANG_USE_HND_KVCACHE)"
        )
    supported = KV_DTYPES.get(keys.device.type, KV_DTYPES["cuda"])
    if keys.dtype not in supported:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in supported)
        raise UnsupportedModelError(f"KV in {keys.dtype} on {keys.device.type} is not supported (only {names})")
    if keys.dtype != dtype:
        raise UnsupportedModelError(f"KV in {keys.dtype} of a model in {dtype} is not supported")


def attention_by_layer(model: torch.nn.Module) -> dict[int, Any]:
    """SGLang's attention module of every layer, by layer number from 0.

    Raises:
        UnsupportedModelError: a layer attends in a way that a3 does not know.
    """
    found: dict[int, Any] = {}
    for name, attention in _attentions(model):
        kind = getattr(attention.attn_type, "value", attention.attn_type)
        if kind != "decoder":
            raise UnsupportedModelError(f"{name} attends in another way than causally ({kind})")
        encoding = getattr(attention, "pos_encoding_mode", "NONE")
        if encoding != "NONE" or getattr(attention, "use_irope", False):
            raise UnsupportedModelError(f"{name} encodes positions in its attention ({encoding})")
        if getattr(attention, "xai_temperature_len", -1) > 0:
            raise UnsupportedModelError(f"{name} scales its logits by position")
        method = getattr(attention, "logit_capping_method", "tanh")
        if attention.logit_cap and method != "tanh":
            raise UnsupportedModelError(f"{name} caps its logits by {method}")
        if attention.is_cross_attention or attention.qk_head_dim != attention.v_head_dim:
            raise UnsupportedModelError(f"{name} is not plain self-attention")
        found[attention.layer_id] = attention
    if not found or sorted(found) != list(range(len(found))):
        raise UnsupportedModelError("no plain stack of attention layers was found in the model")
    return found


def rotary_by_layer(model: torch.nn.Module) -> dict[int, Any]:
    """The rotary module of every attention layer, by layer number.

    Raises:
        UnsupportedModelError: a layer has none, or one of an unknown kind.
    """
    parents, found = dict(model.named_modules()), {}
    for name, attention in _attentions(model):
        rotary = getattr(parents[name], "rotary_emb", None)
        if rotary is None:
            raise UnsupportedModelError(f"{name} has attention but no rotary module")
        kind = type(rotary).__name__
        if kind not in ROTARY_CLASSES:
            raise UnsupportedModelError(f"RoPE of type {kind} is not supported ({', '.join(sorted(ROTARY_CLASSES))})")
        found[attention.layer_id] = rotary
    return found


def _attentions(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """SGLang's attention modules, each with the name of the module that it belongs to."""
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, module in model.named_modules():
        yield from ((name, child) for child in module.children() if isinstance(child, RadixAttention))


def window_of(attention: Any) -> int | None:
    """How many positions before its own a row of this layer attends to; None: to all of them."""
    size = attention.sliding_window_size
    return int(size) if size is not None and size > -1 else None


def check_backend(attentions: Mapping[int, Any], backend: str | None) -> None:
    """Check that SGLang's own attention, which computes prompts and answers, does what the layers ask for.

    Raises:
        UnsupportedModelError: it does not.
    """
    capped = [layer for layer, attention in attentions.items() if attention.logit_cap]
    if capped and backend == "torch_native":
        raise UnsupportedModelError(
            f"layer {capped[0]} caps its logits, which --attention-backend torch_native ignores; use another one"
        )


def check_stack(model: torch.nn.Module) -> None:
    """Check that the model has all its layers in one module, through which the executor's passes can run.

    Raises:
        UnsupportedModelError: it has not.
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


def check_rotation(module: Any, head_dim: int, dtype: torch.dtype) -> None:
    """Rotate random keys with the tables, and compare them with the model's own rotary module at the new positions.

    Args:
        module: SGLang's rotary module.
        head_dim: dimensions of a key.
        dtype: dtype of the KV pool.

    Raises:
        UnsupportedModelError: the keys differ by more than rounding.
    """
    table = RopeTable(module.cos_sin_cache, module.is_neox_style)
    device, reach = module.cos_sin_cache.device, module.cos_sin_cache.shape[0]
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, reach, (2, 64), generator=generator).to(device)
    raw = torch.randn(64, 1, head_dim, generator=generator).to(device=device, dtype=dtype)

    def model_rotates(at: torch.Tensor) -> torch.Tensor:
        keys = raw.clone().view(64, head_dim)
        return module(at, keys.clone(), keys)[1].view(64, 1, head_dim)

    rotated = rotate(model_rotates(positions[0]), *table.rotation(positions[0], positions[1]), table.neox)
    expected = model_rotates(positions[1])
    error = (rotated.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    # One rounding of the stored key and one of the result.
    if not bool((error < 4 * torch.finfo(dtype).eps).all()):
        raise UnsupportedModelError(
            f"keys rotated by the tables of {type(module).__name__} differ from the model's own (by {error.max():.3g})"
        )
