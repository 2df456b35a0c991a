"""8: what cannot be served is refused at start, in one line, by the command a user runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
CASES = {
    "sliding window": (
        LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 512},
        [],
        "sliding-window",
    ),
    "dynamic RoPE": (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, [], "RoPE"),
    "MLA": (
        LLAMA
        | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "head_dim": 16,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
        },
        [],
        "MLA",
    ),
    "no radix cache": (LLAMA, ["--disable-radix-cache"], "disable-radix-cache"),
    "KV in fp8": (LLAMA, ["--kv-cache-dtype", "fp8_e4m3"], "--kv-cache-dtype"),
    "bad ratio": (LLAMA, ["--a3-recompute-ratio", "1.5"], "--a3-recompute-ratio"),
    "unknown selector": (LLAMA, ["--a3-selector", "best"], "--a3-selector"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_one_line(case: str, model: str, tmp_path: Path) -> None:
    config, arguments, named = CASES[case]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model) / file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    server = "--device cpu --attention-backend torch_native --disable-cuda-graph --load-format dummy --host 127.0.0.1"
    command = [sys.executable, "-P", "-m", "sglang.launch_server", "--model-path", str(tmp_path), *server.split()]
    done = subprocess.run(
        [*command, "--port", "31999", "--radix-cache-backend", "a3", *arguments],
        env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stderr[-3000:]
    assert named in errors[0]
    assert "Traceback" not in done.stderr
