"""Time of one lookup and memory per indexed token.

    python benchmarks/index_lookup.py [--tokens 1000000] [--prompt 6000]

Donors are random documents after a shared system prompt. The prompt has pieces of eight of them, cut at random
positions and in another order, after the same system prompt. Two more prompts: documents that are in sixteen donors
each, and one repeated token that a donor has, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc

import numpy as np

from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.search import find_spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--prompt", type=int, default=6_000)
    parser.add_argument("--document", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    args = parser.parse_args()

    random = np.random.default_rng(args.seed)
    system = random.integers(0, 50_000, 200, dtype=np.int32)
    documents = [random.integers(0, 50_000, args.document, dtype=np.int32) for _ in range(args.tokens // args.document)]
    tracemalloc.start()
    index = AnyPositionIndex()
    started = time.perf_counter()
    for i in range(0, len(documents), 4):
        index.add(None, np.concatenate([system, *documents[i : i + 4]]))
    added = time.perf_counter() - started
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    times, found = [], 0
    for _ in range(args.repeats):
        length = (args.prompt - len(system)) // 8
        chosen = random.choice(len(documents), 8, replace=False)
        cuts = random.integers(0, args.document - length + 1, 8) if length < args.document else [0] * 8
        prompt = np.concatenate([system, *(documents[d][c : c + length] for d, c in zip(chosen, cuts, strict=True))])
        started = time.perf_counter()
        spans = find_spans(index, None, prompt, len(system))
        times.append((time.perf_counter() - started) * 1e3)
        found += sum(s.length for s in spans)
        assert sum(s.length for s in spans) >= len(prompt) - len(system) - 8 * 2 * index.block
    popular = [random.permutation(len(documents[:12])) for _ in range(16)]
    for order in popular:
        index.add(
            None, np.concatenate([random.integers(0, 50_000, 50, dtype=np.int32), *(documents[d] for d in order)])
        )
    index.add(None, np.concatenate([random.integers(0, 50_000, 3, dtype=np.int32), np.full(args.prompt, 7, np.int32)]))
    in_many = np.concatenate([documents[d][: args.prompt // 12] for d in random.permutation(12)])
    repeated = np.concatenate([random.integers(0, 50_000, 3, dtype=np.int32), np.full(args.prompt, 7, np.int32)])

    figures = {
        "indexed_tokens": len(index),
        "prompt_tokens": len(prompt),
        "lookup_ms_median": round(statistics.median(times), 3),
        "lookup_ms_max": round(max(times), 3),
        "lookup_ms_in_16_donors": milliseconds(index, in_many, args.repeats),
        "lookup_ms_repeated_token": milliseconds(index, repeated, args.repeats),
        "bytes_per_token": round(held / len(index), 2),
        "add_us_per_1000_tokens": round(added / len(index) * 1e9, 1),
        "found_tokens_mean": found / args.repeats,
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=2)


def milliseconds(index: AnyPositionIndex, prompt: np.ndarray, repeats: int) -> float:
    """Median time of finding a prompt's spans."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        find_spans(index, None, prompt)
        times.append((time.perf_counter() - started) * 1e3)
    return round(statistics.median(times), 3)


if __name__ == "__main__":
    main()
