"""The engines of benchmarks/gpu.py fit on a card with 80 GB, with every default context and batch."""

from __future__ import annotations

import pytest

from a3_sglang.integration import compat
from gpu_suite import engines

CARD = 81559 << 20
"""Bytes of an H100 with 80 GB."""
PER_CHUNK_TOKEN, GRAPHS = 1.5 * (1 << 20), 2 << 30
"""What SGLang reserves per token of a chunk; and an upper bound of the rest that it reserves: graphs, metadata."""


def kv_slots(name: str) -> int:
    """KV slots of a model on the card."""
    config = engines.COMMON | engines.MODELS[name]
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads, layers = (
        config[f"num_{part}"] for part in ("attention_heads", "key_value_heads", "hidden_layers")
    )
    weights = layers * (2 * hidden * dim * (heads + kv_heads) + 3 * hidden * inner) + 2 * hidden * config["vocab_size"]
    return int((engines.MEMORY_SHARE * CARD - 2 * weights) / (4 * layers * kv_heads * dim))


def test_the_longest_contexts_and_the_largest_batch_fit():
    slots = kv_slots("llama-3.1-8b")
    assert slots >= engines.needed_slots(65536, 1)
    assert slots >= engines.needed_slots(16384, 16)
    assert kv_slots("qwen3-14b") >= engines.needed_slots(65536, 1)


def test_chunks_of_the_default_size_fit_and_such_of_a_whole_prompt_would_not():
    free = (1 - engines.MEMORY_SHARE) * CARD
    assert 8192 * PER_CHUNK_TOKEN + GRAPHS <= free < 65536 * PER_CHUNK_TOKEN


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_backend_and_chunk_size_are_sglangs_own(device, monkeypatch):
    monkeypatch.setattr(engines, "DEVICE", device)
    settings = engines.settings()
    assert settings.keys() <= compat.argument_defaults().keys()
    assert not settings.keys() & {"attention_backend", "prefill_attention_backend", "chunked_prefill_size"}
    assert ("mem_fraction_static" in settings) == (device == "cuda")
