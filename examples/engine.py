"""Offline: an engine in this process, and batches of prompts over the same documents in different orders.

    python examples/engine.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The engine takes a server's options as arguments, here a3_recompute_ratio=0.2.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from a3_sglang.cpu import SERVER_ARGUMENTS, serving_dtype
from a3_sglang.frontend import documents

TOWN = json.loads(Path(__file__).with_name("town.json").read_text(encoding="utf-8"))


def prompt(passages: list[dict[str, str]], question: str) -> str:
    context = documents(f"{one['title']}: {one['text']}" for one in passages)
    return f"{context}Question: {question}\nAnswer:"


def summary(report: dict[str, Any]) -> str:
    computed = report["recomputed"] + report["gap"] + report["tail"]
    return f"exact {report['prefix']}, continued {report['continued']}, reused {report['reused']}, computed {computed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--batch", type=int, default=3, help="prompts of the batch")
    args = parser.parse_args()
    device: dict[str, Any] = {}
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        device = {**SERVER_ARGUMENTS, "dtype": serving_dtype()[0], "max_total_tokens": 32768}
    # Imported here, because the import reads the variable above.
    import sglang

    chooser = random.Random(0)
    passages = TOWN["passages"]
    batches = [[prompt(passages, TOWN["questions"][0])]]
    batches += [[prompt(chooser.sample(passages, len(passages)), q) for q in TOWN["questions"][1 : 1 + args.batch]]]
    with sglang.Engine(model_path=args.model, radix_cache_backend="a3", a3_recompute_ratio=0.2, **device) as engine:
        for batch in batches:
            started = time.perf_counter()
            params = {"temperature": 0, "max_new_tokens": 16, "custom_params": {"a3": {"ratio": 0.2}}}
            outs = engine.generate(batch, [params] * len(batch))
            print(f"{len(batch)} prompts in {(time.perf_counter() - started) * 1e3:.0f} ms")
            for out in outs:
                print(f"  {out['text'].strip()!r}\n    {summary(out['meta_info']['a3'])}")


# SGLang starts its processes by importing this file again.
if __name__ == "__main__":
    main()
