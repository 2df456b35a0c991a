"""Configurations of small models of many architectures, by name."""

from __future__ import annotations

from typing import Any

import transformers

VOCABULARY = 512
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Llama with llama3 RoPE": ("LlamaConfig", {"rope_scaling": LLAMA3}),
    "Llama with YaRN": ("LlamaConfig", {"rope_scaling": YARN}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 32}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {"head_dim": 32, **MOE}),
    "GLM-4": ("Glm4Config", {"head_dim": 32}),
    "Phi-3": ("Phi3Config", {}),
    "Cohere": ("CohereConfig", {}),
    "Granite": ("GraniteConfig", {}),
    # SGLang supports OLMo only with one KV head per query head.
    "OLMo": ("OlmoConfig", {"num_key_value_heads": 4}),
    "OLMo-2": ("Olmo2Config", {}),
    "StableLM": ("StableLmConfig", {"partial_rotary_factor": 0.25}),
    "GPT-NeoX": ("GPTNeoXConfig", {"rotary_pct": 0.25}),
    # SGLang's Mistral ignores the window, so a3 does, too.
    "Mistral with a window": ("MistralConfig", {"sliding_window": 96}),
    "Gemma-2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 96, "hidden_act": "gelu_pytorch_tanh"}),
    "Gemma-3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 96, "layer_types": WINDOWS}),
}
"""Per architecture, the config class of transformers and its differences from :data:`SHAPE`."""


def config_of(name: str) -> Any:
    """The transformers config of an architecture."""
    kind, overrides = ARCHITECTURES[name]
    return getattr(transformers, kind)(**SHAPE | overrides)
