"""Everything there is to see on a GPU, in one call: checks, kernels against their floors, time to first token.

    python benchmarks/gpu.py --json results.json

``check``: every kernel against float64 on fresh random inputs; a wrong one ends the run. ``sanitizer``: the same once
more, small, under compute-sanitizer where the machine has it. ``tests``: the project's tests of kernels, on the GPU.
``kernels``: each kernel's time against what the card can do at best (bytes over the measured copy bandwidth,
operations over the measured rate of a matrix product), at the sizes of one layer of Llama-3.1-8B; the ways FlashInfer
offers for the same rows; and other shapes of our row attention. ``engines``: time to first token with dummy weights in
the shapes of Llama-3.1-8B and Qwen3-14B, stock SGLang against a3. ``--small`` runs all of it with tiny sizes, also in
Triton's interpreter on a CPU (``TRITON_INTERPRET=1``, all but the engines), where times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from a3_sglang.attention.flashinfer import FlashInferRowAttention
from a3_sglang.attention.probe_attention import ProbeRows
from a3_sglang.attention.row_attention import RequestRows
from a3_sglang.drift.correction import DriftCorrection, correct_drift
from a3_sglang.drift.model import DriftPredictor, PaddedBlocks, candidates_per_block
from a3_sglang.fusion.executor import Timings
from a3_sglang.fusion.ops import TritonOps
from a3_sglang.kernels.row_attention import Shape, make_tiles, row_attention
from a3_sglang.rope import RopeTable, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 32
QUESTION = 64
TOLERANCE = 1e-2
SHAPES_OF_ROWS = [
    Shape(*of) for of in ((128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 4), (64, 64, 4, 3), (256, 64, 8, 2))
]
"""Other ways to cut row attention than its default."""

TESTS = Path(__file__).parents[1] / "tests" / "kernels"
TESTED = ("copy", "probe_attention", "row_attention", "row_attention_choice", "spread")

SHAPES: dict[str, dict[str, Any]] = {
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


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a call; on CUDA by events, everything compiled and warm beforehand."""
    if DEVICE == "cpu":
        run()
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings(small: bool) -> dict[str, float]:
    """What the card does at best: bytes read and written a second, multiply-adds (as two) a second."""
    n = 2**16 if small else 2**29
    one, other = (torch.randn(n, device=DEVICE).to(DTYPE) for _ in range(2))
    copy = milliseconds(lambda: other.copy_(one))
    side = 256 if small else 8192
    a, b = (torch.randn(side, side, device=DEVICE).to(DTYPE) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    return {"bytes": 2 * n * one.element_size() / copy * 1e3, "flops": 2 * side**3 / product * 1e3}


class Case:
    """One layer's pools, a prompt of random slots, and rows of it; a new draw for each repeat of a check."""

    def __init__(self, context: int, share: float, layers: int = 1, seed: int = 0) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        slots = 2 * context + QUESTION
        self.keys, self.values = (
            [torch.randn(slots, KV_HEADS, DIM, device=DEVICE, generator=generator).to(DTYPE) for _ in range(layers)]
            for _ in "kv"
        )
        order = torch.randperm(slots, device=DEVICE, generator=generator)
        self.slots, self.other = order[:context].contiguous(), order[context : 2 * context].contiguous()
        count = max(1, int(share * context))
        self.rows = torch.randperm(context, device=DEVICE, generator=generator)[:count].sort().values
        self.query = torch.randn(count, HEADS, DIM, device=DEVICE, generator=generator).to(DTYPE)
        self.question = torch.randn(QUESTION, HEADS, DIM, device=DEVICE, generator=generator).to(DTYPE)
        self.own = tuple(
            torch.randn(QUESTION, KV_HEADS, DIM, device=DEVICE, generator=generator).to(DTYPE) for _ in "kv"
        )
        self.fresh = tuple(
            torch.randn(count, KV_HEADS, DIM, device=DEVICE, generator=generator).to(DTYPE) for _ in "kv"
        )
        angle = torch.rand(context, DIM // 2, device=DEVICE, generator=generator) * 2 * math.pi
        self.turn = angle.cos(), angle.sin()
        self.rope = RopeTable(torch.cat(self.turn, -1), True)

    def spread(self) -> DriftCorrection:
        """The rows tell all others, in chunks of 1,000 tokens."""
        context, count = len(self.slots), len(self.rows)
        lengths = [min(1000, context - at) for at in range(0, context, 1000)]
        blocks = PaddedBlocks(lengths, DEVICE)
        drift = DriftPredictor(self.rows, blocks, candidates_per_block(blocks, count))
        places = torch.arange(context, device=DEVICE)
        real = torch.ones(count, dtype=torch.bool, device=DEVICE)
        return DriftCorrection(drift, places[:count], self.slots[self.rows], self.rows, real, self.slots, places)


def weights64(query: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Weights (rows, heads, n) in float64, of rows that see the first ``visible`` keys."""
    keys = keys.double().repeat_interleave(HEADS // KV_HEADS, 1)
    logits = torch.einsum("rhd,nhd->rhn", query.double(), keys) * DIM**-0.5
    unseen = torch.arange(len(keys), device=keys.device) >= visible[:, None]
    return logits.masked_fill(unseen[:, None], -math.inf).softmax(-1)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative; NaN where anything is."""
    return float((found.double() - exact).norm() / exact.norm())


def errors(small: bool) -> dict[str, float]:
    """Relative error of each kernel against float64 on a fresh draw."""
    device, context = TritonOps(), 200 if small else 1500
    case = Case(context, 0.15, layers=2, seed=torch.seed() % 2**31)
    group, found = HEADS // KV_HEADS, {}
    k, v = (pool[0][case.slots] for pool in (case.keys, case.values))

    attend = device.rows.plan(
        [RequestRows(0, len(case.rows), case.slots, case.rows + 1, False)], HEADS, KV_HEADS, DTYPE
    )
    out = attend(case.query, case.keys[0], case.values[0], DIM**-0.5)
    weights = weights64(case.query, k, case.rows + 1)
    v64 = v.double().repeat_interleave(group, 1)
    found["row attention"] = error(out, torch.einsum("rhn,nhd->rhd", weights, v64))

    ask = device.questions.plan([ProbeRows(0, QUESTION, case.slots)], HEADS, KV_HEADS)
    scores = torch.zeros(context, device=DEVICE)
    out = ask(case.question, case.own, (case.keys[0], case.values[0]), DIM**-0.5, scores)
    all_k, all_v = (torch.cat([x, own]) for x, own in zip((k, v), case.own, strict=True))
    weights = weights64(case.question, all_k, torch.arange(QUESTION, device=DEVICE) + context + 1)
    v64 = all_v.double().repeat_interleave(group, 1)
    found["question attention"] = error(out, torch.einsum("rhn,nhd->rhd", weights, v64))
    taken = (weights.square().mean(0).sqrt() * v64.norm(dim=-1).T).sum(0)
    found["relevance"] = error(scores, taken[:context])

    expected = [
        (rotate(keys[case.slots].double(), *(x.double() for x in case.turn), True), values[case.slots].double())
        for keys, values in zip(case.keys, case.values, strict=True)
    ]
    device.copy(device.pools(case.keys, case.values), case.slots, case.other, case.turn, True)
    found["copy"] = max(
        error(pool[case.other], exact)
        for layer, pair in enumerate(expected)
        for pool, exact in zip((case.keys[layer], case.values[layer]), pair, strict=True)
    )

    spread = case.spread()
    pools = case.keys[0], case.values[0]
    moved, before = [pool.to(torch.float32, copy=True) for pool in pools], [pool.double() for pool in pools]
    correct_drift(tuple(moved), case.fresh, spread, case.rope)
    device.spread(pools, case.fresh, spread, case.rope)
    # Of what was added, which is less than what it was added to; both are rounded to the pool's dtype.
    found["spreading"] = max(
        error(after.double() - was, exact.to(DTYPE).double() - was)
        for after, exact, was in zip(pools, moved, before, strict=True)
    )
    return found


def times(context: int, limit: dict[str, float], small: bool) -> list[dict[str, Any]]:
    """Each kernel's time over its floor, one layer of one request; the copy takes all layers."""
    device, rows = TritonOps(), []
    size = torch.finfo(DTYPE).bits // 8
    layers = 2 if small else LAYERS
    case = Case(context, 0.15, layers)
    row_bytes = 2 * KV_HEADS * DIM * size

    def add(name: str, run: Callable[[], Any], moved: float, operations: float) -> None:
        floor = max(moved / limit["bytes"], operations / limit["flops"]) * 1e3
        took = milliseconds(run)
        rows.append({"kernel": name, "context": context, "ms": took, "floor_ms": floor, "of_floor": floor / took})

    pools = device.pools(case.keys, case.values)
    moved = 2 * context * row_bytes * layers
    add("copy, all layers", lambda: device.copy(pools, case.slots, case.other, case.turn, True), moved, 0)

    ask = device.questions.plan([ProbeRows(0, QUESTION, case.slots)], HEADS, KV_HEADS)
    scores, pair = torch.zeros(context, device=DEVICE), (case.keys[0], case.values[0])
    operations = 4 * QUESTION * HEADS * DIM * context
    add("probe", lambda: ask(case.question, case.own, pair, DIM**-0.5, None), context * row_bytes, operations)
    ranked = context * row_bytes * 3 / 2, operations * 3 / 2
    add("probe and relevance", lambda: ask(case.question, case.own, pair, DIM**-0.5, scores), *ranked)

    spread = case.spread()
    known = spread.drift.keys.shape[2]
    # Pools are read and written; each known row's share of each row is a multiply-add, of keys and of values.
    moved, operations = 2 * context * row_bytes, 4 * context * known * KV_HEADS * DIM
    add("spreading", lambda: device.spread(pair, case.fresh, spread, case.rope), moved, operations)

    operations = 4 * HEADS * DIM * int((case.rows + 1).sum())
    for name, attend in row_attentions(case):
        add(name, attend, context * row_bytes, operations)
    return rows


def row_attentions(case: Case) -> list[tuple[str, Callable[[], Any]]]:
    """Our kernel, and what FlashInfer offers for the same rows, where it is installed."""
    count, context = len(case.rows), len(case.slots)
    group, scaling, pair = (
        RequestRows(0, count, case.slots, case.rows + 1, False),
        DIM**-0.5,
        (case.keys[0], case.values[0]),
    )
    attend = TritonOps().rows.plan([group], HEADS, KV_HEADS, DTYPE)
    ways: list[tuple[str, Callable[[], Any]]] = [("row attention", lambda: attend(case.query, *pair, scaling))]
    for shape in SHAPES_OF_ROWS:
        tiles = make_tiles([count], [case.slots], [case.rows + 1], HEADS // KV_HEADS, shape)
        name = f"  rows {shape.rows} context {shape.context} warps {shape.warps} stages {shape.stages}"
        ways.append((name, lambda tiles=tiles: row_attention(case.query, *pair, tiles, scaling)))
    if DEVICE == "cpu":
        return ways
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    pools = case.keys[0].unsqueeze(1), case.values[0].unsqueeze(1)
    exact = ways[0][1]()

    def wrapper(queries: list[int], contexts: list[torch.Tensor]) -> Callable[[], Any]:
        planned = BatchPrefillWithPagedKVCacheWrapper(torch.empty(2**28, dtype=torch.uint8, device=DEVICE), "NHD")
        lengths = torch.tensor([0, *map(len, contexts)], dtype=torch.int32)
        planned.plan(
            torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            lengths.cumsum(0, dtype=torch.int32),
            torch.cat(contexts).int(),
            torch.ones(len(contexts), dtype=torch.int32),
            HEADS,
            KV_HEADS,
            DIM,
            1,
            causal=True,
            q_data_type=DTYPE,
        )
        return lambda: planned.run(case.query, pools)

    def masked() -> Callable[[], Any]:
        planned = FlashInferRowAttention(DEVICE).plan([group], HEADS, KV_HEADS, DTYPE)
        return lambda: planned(case.query, *pair, scaling)

    places = case.rows.tolist()
    starts = [i for i, p in enumerate(places) if not i or p != places[i - 1] + 1]
    runs = [end - begin for begin, end in zip(starts, [*starts[1:], count], strict=True)]
    contexts = [case.slots[: places[begin] + n] for begin, n in zip(starts, runs, strict=True)]
    candidates = {
        "FlashInfer, a bit for each pair": masked,
        "FlashInfer, runs as sequences": lambda: wrapper(runs, contexts),
    }
    for name, make in candidates.items():
        try:
            run = make()
            wrong = error(run(), exact.double())
        except Exception as reason:  # One way that does not work is a result too.
            print(f"{name}: {type(reason).__name__}: {reason}")
            continue
        if wrong < TOLERANCE:
            ways.append((name, run))
        else:
            print(f"{name}: differs from the other by {wrong:.3g}")
    # The same number of rows and of operations as one causal prefill behind an exact prefix: what FlashInfer can do.
    dense = wrapper([count], [case.slots[: context // 2 + count // 2]])
    return [*ways, ("FlashInfer, as many causal rows", dense)]


@contextmanager
def shape(name: str, small: bool):
    """A folder with the configuration of a model."""
    config = COMMON | SHAPES[name]
    if small:
        config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1024}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        config |= {"bos_token_id": 1, "eos_token_id": 2}
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        yield folder


def first_tokens(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time to first token of one shape: stock SGLang first, then a3, each with one engine for all cases."""
    from a3_sglang.client import Prompts, engine, environment, vocabulary_of
    from a3_sglang.evaluation.ttft import full_prefills, fused_prefills, summary

    cases = [(c, 1) for c in args.contexts] + [(args.contexts[0], batch) for batch in args.batches if batch > 1]
    # A prompt is prefilled in one chunk, which is stock's best setting; a batch may take several.
    room: dict[str, Any] = {"chunked_prefill_size": 2 * max(args.contexts)}
    room |= {"load_format": "dummy", "skip_tokenizer_init": True}
    if DEVICE == "cuda":
        room |= {"attention_backend": "flashinfer", "dtype": "bfloat16", "grammar_backend": "none"}
    with shape(name, args.small) as folder:

        def prompts(case: tuple[int, int]) -> Prompts:
            return Prompts(vocabulary_of(folder), case[0], args.chunks, seed=cases.index(case))

        with engine(folder, None, **room) as running:
            stock = {case: full_prefills(running, prompts(case), args.repeats, case[1], int) for case in cases}
        variables = {"A3_TIMINGS": "1", "A3_ROW_ATTENTION": args.row_attention}
        with environment(**variables), engine(folder, "a3", **room) as running:
            for context, batch in cases:
                for ratio in args.ratios if batch == 1 else args.ratios[:1]:
                    pairs = fused_prefills(running, prompts((context, batch)), ratio, args.repeats, batch, int)
                    figures = summary(stock[context, batch], pairs)
                    yield {"model": name, "context": context, "batch": batch, "ratio": ratio} | figures


COMMANDS = {
    "sanitizer": [
        "compute-sanitizer",
        "--error-exitcode",
        "1",
        sys.executable,
        __file__,
        "--small",
        "--parts",
        "check",
    ],
    "tests": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=append"]
    + [str(TESTS / f"test_{name}.py") for name in TESTED],
}
"""Parts that are programs of their own."""


def outcome(command: list[str]) -> str:
    """Last line of what a program says; a failure ends the run."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not on this machine"
    if "pytest" in command and not all(map(find_spec, ("pytest", "hypothesis", "safetensors"))):
        return "pytest or hypothesis is not on this machine"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return (done.stdout.strip().splitlines() or ["done"])[-1]


def packages() -> dict[str, str]:
    found = {}
    for name in ("a3-sglang", "sglang", "torch", "triton", "flashinfer-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def check(args: argparse.Namespace, figures: dict[str, Any]) -> Iterator[str]:
    figures["errors"] = errors(args.small)
    # Not a number is not below it either.
    wrong = {kernel: value for kernel, value in figures["errors"].items() if not value < TOLERANCE}
    if wrong:
        raise SystemExit(f"error: kernels differ from float64: {wrong}")
    for kernel, value in figures["errors"].items():
        yield f"{kernel}: relative error {value:.2e}"


def kernels(args: argparse.Namespace, figures: dict[str, Any]) -> Iterator[str]:
    limit = figures["ceilings"] = ceilings(args.small)
    yield f"copy {limit['bytes'] / 1e9:.0f} GB/s, matrix product {limit['flops'] / 1e12:.1f} TFLOP/s"
    figures["kernels"] = []
    for context in args.contexts:
        for row in times(context, limit, args.small):
            figures["kernels"].append(row)
            yield (
                f"{row['context']:6d} {row['kernel']:40s} {row['ms']:9.3f} ms  floor {row['floor_ms']:9.4f} ms  "
                f"{row['of_floor']:.0%}"
            )


def engines(args: argparse.Namespace, figures: dict[str, Any]) -> Iterator[str]:
    figures["first_tokens"] = []
    for model in args.models:
        for row in first_tokens(model, args):
            figures["first_tokens"].append(row)
            parts = " ".join(f"{part} {row[part + '_ms']:.1f}" for part in Timings.PARTS)
            yield (
                f"{row['model']:13s} {row['context']:6d} x{row['batch']:<3d} {row['ratio']:.2f}  "
                f"full {row['full_ms']:8.1f}  a3 {row['a3_ms']:8.1f}  {parts}  {row['speedup']:.2f}x"
            )


def program(part: str) -> Part:
    def run(_args: argparse.Namespace, figures: dict[str, Any]) -> Iterator[str]:
        figures[part] = outcome(COMMANDS[part])
        yield f"{part}: {figures[part]}"

    return run


Part = Callable[[argparse.Namespace, dict[str, Any]], Iterator[str]]
PARTS: dict[str, Part] = {
    "check": check,
    "sanitizer": program("sanitizer"),
    "tests": program("tests"),
    "kernels": kernels,
    "engines": engines,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=list(PARTS), type=numbers(str), help="of " + ", ".join(PARTS))
    parser.add_argument("--row-attention", default="auto", help="of the engines: auto, flashinfer or triton")
    parser.add_argument("--models", default=",".join(SHAPES), type=numbers(str))
    parser.add_argument("--contexts", default="16384,4096,8192,32768,65536", type=numbers(int))
    parser.add_argument("--ratios", default="0.15,0.05,0.3", type=numbers(float))
    parser.add_argument("--batches", default="1,4,16", type=numbers(int), help="of prompts of the first context")
    parser.add_argument("--chunks", default=16, type=int)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    figures: dict[str, Any] = {"device": name, "packages": packages(), "arguments": vars(args) | {"json": None}}
    lines = [f"{name}, {figures['packages']}"]
    for part in (part for part in PARTS if part in args.parts):
        for line in PARTS[part](args, figures):
            lines.append(line)
            print(line, flush=True)
            # What is measured stays, whatever comes after it.
            if args.json:
                args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
