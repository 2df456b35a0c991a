"""Which KV pools can be read and written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from a3_sglang.fusion.interface import UnsupportedModelError
from a3_sglang.integration.model_checks import check_kv


def pool(device: str, dtype: torch.dtype, ndim: int = 3) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, ndim=ndim)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works_everywhere(device, dtype):
    check_kv(pool(device, dtype), dtype)


def test_float32_works_on_a_cpu_only():
    check_kv(pool("cpu", torch.float32), torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"KV in torch\.float32 on cuda is not supported \(only bf"):
        check_kv(pool("cuda", torch.float32), torch.float32)


def test_other_layouts_and_dtypes_are_refused():
    with pytest.raises(UnsupportedModelError, match="a KV pool with 4 dimensions is not supported"):
        check_kv(pool("cuda", torch.bfloat16, 4), torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"KV in torch\.float8_e4m3fn on cuda is not supported"):
        check_kv(pool("cuda", torch.float8_e4m3fn), torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"KV in torch\.float16 of a model in torch\.bfloat16"):
        check_kv(pool("cpu", torch.float16), torch.bfloat16)
