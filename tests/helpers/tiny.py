"""Small random models, for tests whose text need not make sense."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def tiny_llama(**overrides: Any) -> LlamaConfig:
    """The default shape: 6 layers, 256 wide, grouped-query attention, SmolLM2's vocabulary."""
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**shape | overrides)


def save_random_model(folder: Path, config: Any, tokenizer: Path, seed: int = 0, deviation: float = 0.06) -> Path:
    """Write a model with normally distributed weights, ready for SGLang.

    Args:
        folder: is created if missing.
        config: a transformers config of a causal language model.
        tokenizer: a model folder whose tokenizer is copied.
        seed: of the weights.
        deviation: standard deviation of the weight matrices; at 0.06, attention is far from uniform.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=deviation, generator=generator)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder)
    return folder
