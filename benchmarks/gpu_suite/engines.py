"""Time to first token of stock SGLang and of a3, with dummy weights."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_suite.card import DEVICE

MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen3-14b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 131072,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}
COMMON = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


@contextmanager
def model_folder(name: str, small: bool) -> Iterator[str]:
    """A folder with the configuration of a model and no weights."""
    config = COMMON | MODELS[name]
    if small:
        config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1024}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        config |= {"bos_token_id": 1, "eos_token_id": 2}
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        yield folder


MEMORY_SHARE = 0.8
"""Share of the card's memory for weights and KV. On 80 GB SGLang takes 0.83 by itself; what is left here holds the
activations of a chunk of its default size and of a3's passes."""


def settings() -> dict[str, Any]:
    """Arguments of both engines, the same; what is not named is SGLang's default, attention backend and chunk size too.

    A larger chunk would not start: SGLang reserves 1.5 MB per token of it, and captures more prefill graphs.
    """
    named: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    if DEVICE == "cuda":
        named |= {"dtype": "bfloat16", "grammar_backend": "none", "mem_fraction_static": MEMORY_SHARE}
    return named


def needed_slots(context: int, batch: int) -> int:
    """KV slots of a batch and of its donor, with room for their questions."""
    return (batch + 1) * (context + 256)


def first_tokens(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time to first token of one model: stock SGLang first, then a3, each with one engine for all cases."""
    from a3_sglang.client import Prompts, engine, environment, vocabulary_of
    from a3_sglang.evaluation.ttft import full_prefills, fused_prefills, summary

    cases = [(c, 1) for c in args.contexts] + [(args.contexts[0], batch) for batch in args.batches if batch > 1]
    with model_folder(name, args.small) as folder:

        def prompts(case: tuple[int, int]) -> Prompts:
            return Prompts(vocabulary_of(folder), case[0], args.chunks, seed=cases.index(case))

        with engine(folder, None, **settings()) as running:
            info = running.get_server_info()
            fitting = [case for case in cases if needed_slots(*case) <= info["max_total_num_tokens"]]
            for context, batch in (case for case in cases if case not in fitting):
                print(f"{name}: {batch} x {context} tokens do not fit into {info['max_total_num_tokens']} slots")
            stock = {case: full_prefills(running, prompts(case), args.repeats, case[1], int) for case in fitting}
        attention = info["prefill_attention_backend"] or info["attention_backend"]
        variables = {"A3_TIMINGS": "1", "A3_ROW_ATTENTION": args.row_attention}
        with environment(**variables), engine(folder, "a3", **settings()) as running:
            for context, batch in fitting:
                for ratio in args.ratios if batch == 1 else args.ratios[:1]:
                    pairs = fused_prefills(running, prompts((context, batch)), ratio, args.repeats, batch, int)
                    figures = summary(stock[context, batch], pairs)
                    case = {"model": name, "attention": attention, "context": context, "batch": batch, "ratio": ratio}
                    yield case | figures
