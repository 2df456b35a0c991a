"""8: a configuration that cannot be served is refused at start with one line, by the command that users run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.arguments import CPU, LLAMA, refused, resolved, write_model

MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 512}
DEEPSEEK = {
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
}

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "head_dim": 16,
}

# ---- models


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic'"),
        (DEEPSEEK, "MLA"),
        (GPT_OSS, "add --disable-hybrid-swa-memory"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "embedding"),
    ],
    ids=["RoPE", "MLA", "window pool", "classification"],
)
def test_models_that_are_refused(tmp_path: Path, config: dict[str, Any], named: str):
    # gpt-oss refuses the backend torch_native.
    arguments = CPU | {"attention_backend": None} if config is GPT_OSS else CPU
    assert named in (refused(resolved(write_model(tmp_path, LLAMA | config), **arguments)) or "")


@pytest.mark.parametrize(
    "config",
    [
        {},
        MISTRAL,
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}},
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "use_sliding_window": False,
            "sliding_window": 512,
        },
    ],
    ids=["llama", "mistral", "linear", "yarn", "qwen2"],
)
def test_models_that_are_served(tmp_path: Path, config: dict[str, Any]):
    assert refused(resolved(write_model(tmp_path, LLAMA | config), **CPU)) is None


# ---- the command


@pytest.mark.engine
@pytest.mark.parametrize(
    ("config", "arguments", "named"),
    [
        ({}, ["--a3-recompute-ratio", "1.5"], "--a3-recompute-ratio"),
        ({}, ["--a3-allow", "enable_nothing"], "--a3-allow: SGLang has no server option 'enable_nothing'"),
        (DEEPSEEK, [], "MLA"),
        ({}, ["--disable-radix-cache"], "--disable-radix-cache"),
        (
            {},
            ["--a3-allow", "forward_hooks", "--strip-thinking-cache"],
            "--strip-thinking-cache: not known to work with a3; to use it all the same, add "
            "--a3-allow forward_hooks,strip_thinking_cache",
        ),
    ],
    ids=["bad option", "nothing to allow", "model", "known to be wrong", "not known"],
)
def test_refused_with_one_line(config: dict[str, Any], arguments: list[str], named: str, model: str, tmp_path: Path):
    folder = write_model(tmp_path, LLAMA | config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model) / file, folder)
    server = "--device cpu --attention-backend torch_native --disable-cuda-graph --load-format dummy --host 127.0.0.1"
    command = [sys.executable, "-P", "-m", "sglang.launch_server", "--model-path", folder, *server.split()]
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
