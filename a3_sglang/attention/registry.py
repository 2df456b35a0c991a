"""Row attention on CUDA devices. A backend is added by a file beside this one and a line in :data:`ROW_ATTENTION`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from a3_sglang.attention.base import RowAttention
from a3_sglang.attention.flashinfer import FlashInferRowAttention
from a3_sglang.attention.triton import TritonRowAttention

ROW_ATTENTION: dict[str, Callable[[torch.device], RowAttention]] = {
    "flashinfer": FlashInferRowAttention,
    "triton": lambda _device: TritonRowAttention(),
}
"""Constructors by name, called with the device. Neither FlashInfer nor Triton is imported before a pass is planned."""

ROW_ATTENTION_NAMES = tuple(ROW_ATTENTION)
"""Values of ``--a3-row-attention``, besides "auto"."""
