"""All measurements on a GPU in one call: checks, kernels against their floors, time to first token.

    python benchmarks/gpu.py --json results.json

``check``: every kernel against float64 on fresh random inputs; a wrong one ends the run. ``sanitizer``: the same with
small sizes under compute-sanitizer, if it is installed. ``tests``: the project's tests of kernels, on the GPU.
``kernels``: each kernel's time against what the card can do at best (bytes over the measured copy bandwidth,
operations over the measured rate of a matrix product), at the sizes of one layer of Llama-3.1-8B; libraries' ways to
compute the same rows; and other tile shapes of our row attention. ``engines``: time to first token with dummy weights
in the shapes of Llama-3.1-8B and Qwen3-14B, stock SGLang (with the attention backend that it chooses) against a3.
``--small`` runs everything with tiny sizes; on a CPU all but the engines also run in Triton's interpreter
(``TRITON_INTERPRET=1``), but times mean nothing there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from a3_sglang.attention.registry import ROW_ATTENTION_NAMES
from a3_sglang.timing import Timings
from gpu_suite.card import DEVICE, ceilings
from gpu_suite.case import TOLERANCE
from gpu_suite.check import errors
from gpu_suite.engines import MODELS, first_tokens
from gpu_suite.kernels import times

TESTS = Path(__file__).parents[1] / "tests" / "kernels"
TESTED = (
    "copy",
    "probe_attention",
    "row_attention",
    "row_attention_choice",
    "drift_selection",
    "drift_weights",
    "drift_correction",
)

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
"""Parts that are separate programs."""


def outcome(command: list[str]) -> str:
    """Last line of a program's output; a failure ends the run."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    if "pytest" in command and not all(map(find_spec, ("pytest", "hypothesis", "safetensors"))):
        return "pytest, hypothesis or safetensors is not installed"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return (done.stdout.strip().splitlines() or ["done"])[-1]


def packages() -> dict[str, str]:
    found = {}
    for name in ("a3-sglang", "sglang", "torch", "triton", "sglang-kernel", "flashinfer-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def check(args: argparse.Namespace, figures: dict[str, Any]) -> Iterator[str]:
    figures["errors"] = errors(args.small)
    # `not <` also catches NaN.
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
                f"{row['model']:13s} {row['attention']} {row['context']:6d} x{row['batch']:<3d} {row['ratio']:.2f}  "
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
    parser.add_argument("--parts", default=list(PARTS), type=numbers(str), help="any of " + ", ".join(PARTS))
    parser.add_argument("--row-attention", default="auto", help=", ".join(("auto", *ROW_ATTENTION_NAMES)))
    parser.add_argument("--models", default=",".join(MODELS), type=numbers(str))
    parser.add_argument("--contexts", default="16384,4096,8192,32768,65536", type=numbers(int))
    parser.add_argument("--ratios", default="0.15,0.05,0.3", type=numbers(float))
    parser.add_argument("--batches", default="1,4,16", type=numbers(int), help="prompts of the first context per batch")
    parser.add_argument("--chunks", default=16, type=int)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    figures: dict[str, Any] = {"device": name, "packages": packages(), "arguments": vars(args) | {"json": None}}
    lines = [f"{name}, {figures['packages']}"]
    for part in (part for part in PARTS if part in args.parts):
        for line in PARTS[part](args, figures):
            lines.append(line)
            print(line, flush=True)
            # Written after each line, so that a later failure loses nothing.
            if args.json:
                args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
