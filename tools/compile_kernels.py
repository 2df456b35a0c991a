"""Compiles all kernels for a GPU that need not be present, as one layer of Llama-3.1-8B would launch them.

    python tools/compile_kernels.py 90

prints as JSON the version of Triton and, for each kernel: registers per thread, bytes spilled, bytes of shared memory
per program; numbers of instructions: matrix products of two kinds, accesses to global memory of 16 bytes and of less
than 4, asynchronous copies of 16 bytes and of less; and how many of the asynchronous copies that a loop has asked for
are still on their way when it waits. Another Triton is used if a folder with it is first on ``PYTHONPATH``.
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
from a3_sglang.drift.correction import ObservedRows
from a3_sglang.drift.model import DEFAULT
from a3_sglang.drift.tables import covariance_table
from a3_sglang.fusion.ops import TritonOps
from a3_sglang.kernels.common import LOG2E
from a3_sglang.kernels.drift_selection import BlockTable, select_rows
from a3_sglang.kernels.row_attention import Start, default_shape, make_tiles, row_attention
from a3_sglang.rope import RopeTable

SHAPES = {"": (32, 8, 128), " of 256": (16, 8, 256)}
"""Query heads, KV heads and dimensions of a layer, by what is added to the names of its kernels: Llama-3.1-8B's layers,
and the largest heads of today's models."""


class Absent(CudaDriver):
    """The driver of a GPU that is absent: enough of it to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.get_device_capability = lambda *_: divmod(target.arch, 10)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda *_: 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def launch(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    """Launch all kernels of a fused prefill, over zeros."""
    ops, context, rows = TritonOps(), 1024, 160
    keys, values = (torch.zeros(2 * context, kv_heads, dim, dtype=dtype) for _ in "kv")
    slots, observed = torch.arange(context), torch.arange(rows) * 6 + 1
    rope = RopeTable(torch.zeros(context, dim), True)

    ops.copy(ops.pools([keys], [values]), slots, slots + context, rope.rotation(slots, slots), True)

    query, probe = (torch.zeros(n, heads, dim, dtype=dtype) for n in (rows, 64))
    fresh = tuple(torch.zeros(n, kv_heads, dim, dtype=dtype) for n in (rows, rows))
    own = tuple(part[:64] for part in fresh)
    specs = AttentionSpec(1.0), AttentionSpec(1.0, window=512, logit_cap=30.0, sinks=torch.zeros(heads))
    attend = ops.probe_attention.plan([ProbeRows.after(slots, 64)], heads, kv_heads)
    for spec in specs:
        attend(probe, own, (keys, values), spec, torch.zeros(context))

    attend = ops.row_attention.plan([RequestRows(0, rows, slots, observed, False)], heads, kv_heads, dtype)
    for spec in specs:
        attend(query, keys, values, spec)
    # After paged attention by a library, see a3_sglang/attention/paged.py.
    start = Start(torch.zeros_like(query), torch.zeros(heads, rows).T, LOG2E)
    tiles = make_tiles([rows], [slots], [observed], heads // kv_heads, default_shape())
    row_attention(query, keys, values, tiles, specs[0], start)

    observed_rows = ObservedRows([(0, context)], slots, slots, observed, 0, rows, 0, context)
    ops.plan_drift_correction(DEFAULT, [observed_rows], dtype)((keys, values), fresh, rope)

    # As many candidates as 15% of the rows have.
    blocks = BlockTable([(0, context, begin, 512, begin, 192) for begin in range(0, context, 512)], [2])
    select_rows(torch.zeros(context), blocks, [[10] * 16], covariance_table(DEFAULT.keys, context, slots.device))


def needs(kernel: Any, arch: int) -> dict[str, int]:
    """Resources and instructions of a compiled kernel, from the assembler and the PTX."""
    ptx = kernel.asm["ptx"]
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x[0-9a-f]+|\d+)", ptx)]
    waits = re.findall(r"ttg\.async_wait.*\{num = (\d+)", kernel.asm["ttgir"])
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
        "async_wide": copies.count(16),
        "async_narrow": len(copies) - copies.count(16),
        "on_their_way": max((int(count) for count in waits), default=0),
    }


def main(arch: int) -> None:
    triton.runtime.driver.set_active(Absent(GPUTarget("cuda", arch, 32)))
    compiled: dict[str, Any] = {}
    run, dtype, shape = JITFunction.run, torch.float32, ""

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        variant = "".join(f" {flag.lower()}" for flag in ("FIRST", "STARTED", "WINDOWED") if kwargs.get(flag))
        compiled[f"{self.__name__}{variant}{shape} {dtype}".replace("torch.", "")] = kernel
        return kernel

    JITFunction.run = compile_only
    for shape, dtype in (("", torch.bfloat16), ("", torch.float16), (" of 256", torch.bfloat16)):
        launch(dtype, *SHAPES[shape])
    found = {name: needs(kernel, arch) for name, kernel in compiled.items()}
    print(json.dumps({"triton": triton.__version__, "kernels": found}, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]))
