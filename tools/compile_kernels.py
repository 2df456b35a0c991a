"""Compiles all kernels for a GPU that need not be present, as one layer of Llama-3.1-8B would launch them.

    python tools/compile_kernels.py 90

prints as JSON, for each kernel: registers per thread, bytes spilled, bytes of shared memory per program, and numbers of
instructions: matrix products of two kinds, accesses to global memory of 16 bytes and of less than 4.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction

from a3_sglang.attention.base import AttentionSpec, ProbeRows, RequestRows
from a3_sglang.drift.correction import DriftCorrection, DriftPredictor
from a3_sglang.drift.model import DEFAULT, PaddedBlocks
from a3_sglang.fusion.ops import TritonOps
from a3_sglang.rope import RopeTable

HEADS, KV_HEADS, DIM = 32, 8, 128


class Absent(CudaDriver):
    """The driver of a GPU that is absent: enough of it to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.get_device_capability = lambda *_: divmod(target.arch, 10)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda *_: 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def launch(dtype: torch.dtype) -> None:
    """Launch all kernels of a fused prefill, over zeros."""
    ops, context, rows = TritonOps(), 1024, 160
    keys, values = (torch.zeros(2 * context, KV_HEADS, DIM, dtype=dtype) for _ in "kv")
    slots, observed = torch.arange(context), torch.arange(rows) * 6 + 1
    rope = RopeTable(torch.zeros(context, DIM), True)

    ops.copy(ops.pools([keys], [values]), slots, slots + context, rope.rotation(slots, slots), True)

    query, probe = (torch.zeros(n, HEADS, DIM, dtype=dtype) for n in (rows, 64))
    fresh = tuple(torch.zeros(n, KV_HEADS, DIM, dtype=dtype) for n in (rows, rows))
    own = tuple(part[:64] for part in fresh)
    attend = ops.probe_attention.plan([ProbeRows.after(slots, 64)], HEADS, KV_HEADS)
    attend(probe, own, (keys, values), AttentionSpec(1.0), torch.zeros(context))

    attend = ops.row_attention.plan([RequestRows(0, rows, slots, observed, False)], HEADS, KV_HEADS, dtype)
    attend(query, keys, values, AttentionSpec(1.0))

    blocks = PaddedBlocks([context], "cpu")
    correction = DriftCorrection(
        DriftPredictor(DEFAULT, observed, blocks, context),
        torch.arange(rows),
        slots[observed],
        observed,
        torch.ones(rows, dtype=torch.bool),
        slots,
        slots,
    )
    ops.correct_drift((keys, values), fresh, correction, rope)


def needs(kernel: Any, arch: int) -> dict[str, int]:
    """Resources and instructions of a compiled kernel, from the assembler and the PTX."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        name = f"sm_{arch}{'a' if arch == 90 else ''}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", source, "-o", Path(folder, "out")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "shared": kernel.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "wide": len(re.findall(r"(?:ld|st)\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
        "narrow": len(re.findall(r"(?:ld|st)\.global\S*\.b(?:8|16)\b", ptx)),
    }


def main(arch: int) -> None:
    triton.runtime.driver.set_active(Absent(GPUTarget("cuda", arch, 32)))
    compiled: dict[str, Any] = {}
    run, dtype = JITFunction.run, torch.float32

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[f"{self.__name__} {dtype}".replace("torch.", "")] = kernel
        return kernel

    JITFunction.run = compile_only
    for dtype in (torch.bfloat16, torch.float16):
        launch(dtype)
    print(json.dumps({name: needs(kernel, arch) for name, kernel in compiled.items()}, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]))
