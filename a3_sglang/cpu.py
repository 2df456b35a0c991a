"""The dtype in which a model is served on a CPU. Standard library only, so that it is fast to import."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

SERVER_ARGUMENTS = {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}
"""Arguments of SGLang for serving on a CPU."""
BF16_FLAGS = {"avx512_bf16": "AVX512_BF16", "amx_bf16": "AMX", "bf16": "Arm's bf16"}
"""Flags of /proc/cpuinfo that mean fast bfloat16 matrix products, and the names of these extensions."""
_LOWER = {
    "ATEN_CPU_CAPABILITY": ("default", "avx2"),
    "ONEDNN_MAX_CPU_ISA": ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"),
}
"""Values of PyTorch's and oneDNN's environment variables that disable these instructions."""


def serving_dtype() -> tuple[str, str]:
    """The dtype for serving on this CPU, by SGLang's name for it, and the reason in a few words."""
    return choose_dtype(cpu_flags(), os.environ)


def choose_dtype(flags: frozenset[str], environ: Mapping[str, str]) -> tuple[str, str]:
    """Like :func:`serving_dtype`, for a CPU with these flags.

    Without dedicated instructions, bfloat16 products run at about a fifth of float32's rate.

    Args:
        flags: of the CPU, by their names in /proc/cpuinfo.
        environ: environment variables; ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA`` may disable instructions.
    """
    found = next((name for flag, name in BF16_FLAGS.items() if flag in flags), None)
    if found is None:
        return "float32", "the CPU has no bfloat16 instructions"
    for variable, lower in _LOWER.items():
        if environ.get(variable, "").lower() in lower:
            return "float32", f"{variable}={environ[variable]} turns {found} off"
    return "bfloat16", f"the CPU has {found}"


def cpu_flags() -> frozenset[str]:
    """Flags of the first CPU in /proc/cpuinfo; empty on systems without that file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    name = "Features" if platform.machine().startswith(("aarch64", "arm")) else "flags"
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(name)), frozenset())
