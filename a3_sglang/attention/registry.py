"""Row attention on CUDA devices. A backend is added by a file beside this one and a line in :data:`ROW_ATTENTION`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from a3_sglang.attention.base import RowAttention
from a3_sglang.attention.flash_attention import FlashAttention3RowAttention
from a3_sglang.attention.flashinfer import FlashInferRowAttention
from a3_sglang.attention.triton import TritonRowAttention

ROW_ATTENTION: dict[str, Callable[[torch.device], RowAttention]] = {
    "fa3": FlashAttention3RowAttention,
    "flashinfer": FlashInferRowAttention,
    "triton": lambda _device: TritonRowAttention(),
}
"""Constructors by name, called with the device. No library is imported before one is constructed or plans a pass."""

VARIANTS: dict[str, Callable[[torch.device], RowAttention]] = {
    "triton 64 x 64": lambda _device: TritonRowAttention((64, 64, 4, 3)),
}
"""More candidates that "auto" tries at start; ``--a3-row-attention`` does not accept their names."""

ROW_ATTENTION_NAMES = tuple(ROW_ATTENTION)
"""Values of ``--a3-row-attention``, besides "auto"."""
