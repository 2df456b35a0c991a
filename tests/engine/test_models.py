"""Every supported kind of model works: small random models of many architectures, each on a separate engine."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from a3_sglang.client import engine, engine_arguments, environment, flush, generate
from a3_sglang.reporting.report import PARTS
from helpers.models import ARCHITECTURES, VOCABULARY, config_of
from helpers.tiny import save_random_model

pytestmark = [pytest.mark.engine, pytest.mark.core]

ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "chunked_prefill_size": 2048,
    "max_total_tokens": 8192,
    "context_length": 4096,
}
REFUSED = {
    "Gemma-2": r"RefusedError: .*caps its logits, which --attention-backend torch_native ignores",
    "GPT-NeoX": r"RefusedError: .*no plain stack of attention layers|No accelerator|No module or parameter named",
}
"""What the log says about architectures that are refused.

SGLang runs GPT-NeoX by transformers' own code only; its release 0.5.17 cannot do that on a CPU.
"""


def tokens(count: int) -> list[int]:
    return [random.randrange(5, VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_equals_its_full_prefill_or_is_refused(name: str, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "model", config_of(name), Path())
    if name in REFUSED:
        # In a separate process, because SGLang ends the whole process if its scheduler cannot start.
        arguments = engine_arguments(str(folder), radix_cache_backend="a3", **ARGUMENTS)
        code = f"import sglang\nif __name__ == '__main__':\n    sglang.Engine(**{arguments!r})\n"
        (tmp_path / "start.py").write_text(code)
        command = [sys.executable, "-P", tmp_path / "start.py"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode != 0
        assert re.search(REFUSED[name], done.stderr)
        return
    with (
        environment(A3_DUMP_KV=str(tmp_path), A3_REPORT="exact", A3_MIN_SAVING="0"),
        engine(str(folder), "a3", **ARGUMENTS) as running,
    ):

        def ask(ids: list[int], a3: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            out = generate(running, ids, 6, a3, return_logprob=True)
            return out, torch.load(tmp_path / f"{out['meta_info']['id']}.pt")

        # Long passages with little text between them, a gap and a question.
        passages = [tokens(200) for _ in range(4)]
        prompt = [*tokens(3), *passages[2], *passages[0], *tokens(30), *passages[1], *tokens(40)]
        full, exact = ask(prompt, False)
        for ratio in (1.0, 0.2):
            flush(running)
            ask([token for passage in passages for token in passage], False)
            fused, kv = ask(prompt, {"ratio": ratio})
            report = fused["meta_info"]["a3"]
            assert report["reason"] is None
            assert sum(report[part] for part in PARTS) == len(prompt)
            end = len(prompt) - report["tail"]
            assert end > 500
            if ratio == 1.0:
                assert report["reused"] == 0
                assert fused["output_ids"] == full["output_ids"]
                for part in "kv":
                    assert_close(kv[part][:, :end], exact[part][:, :end], rtol=1e-3, atol=1e-4)
                continue
            assert report["reused"] > 400
            # Layer 0 has attended to no context. Deeper layers have, so copied rows differ there.
            for part in "kv":
                assert_close(kv[part][0, :end], exact[part][0, :end], rtol=1e-3, atol=1e-4)
            assert not torch.allclose(kv["v"][-1, :end], exact["v"][-1, :end], rtol=1e-3, atol=1e-4)
        # A plain request afterwards gets the same answer as before, and no slot is lost.
        flush(running)
        assert ask(prompt, False)[0]["output_ids"] == full["output_ids"]
        flush(running)
