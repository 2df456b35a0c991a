"""SGLang's forward pass: batches, attention backends and CUDA graphs of the prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


def make_extend_batch(tokens: torch.Tensor, positions: torch.Tensor) -> Any:
    """A ForwardBatch of one synthetic request, for rows that do not attend through SGLang's own backend.

    It forces no host-device sync: nothing is copied between host and device, in either direction.

    Args:
        tokens: int64 (rows,).
        positions: int64 (rows,).
    """
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode

    count, device = len(tokens), tokens.device
    one = torch.full((1,), count, dtype=torch.int64, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=tokens,
        req_pool_indices=zero,
        seq_lens=one,
        out_cache_loc=torch.zeros(count, dtype=torch.int64, device=device),
        seq_lens_sum=count,
    )
    batch.positions = positions
    batch.seq_lens_cpu = torch.tensor([count], dtype=torch.int64)
    batch.extend_num_tokens = count
    batch.extend_seq_lens, batch.extend_prefix_lens, batch.extend_start_loc = one, zero, zero
    batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = [count], [0]
    batch.extend_logprob_start_lens_cpu = [0]
    batch.capture_hidden_mode = CaptureHiddenMode.NULL
    if hasattr(batch, "mark_forward_metadata_ready"):
        batch.mark_forward_metadata_ready()
    return batch


def attention_backend(forward: Callable[..., torch.Tensor], pool: Any, request_pool: Any) -> Any:
    """An SGLang attention backend that calls ``forward(q, k, v, layer, sinks)`` for every layer.

    Any further argument of attention would change its result, so it raises a TypeError.
    """
    return _backend_class()(forward, pool, request_pool)


@cache
def _backend_class() -> Any:
    """The class of :func:`attention_backend`, made once: its base can be imported only where SGLang is."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    class A3Attention(AttentionBackend):
        def __init__(self, forward: Callable[..., torch.Tensor], pool: Any, request_pool: Any) -> None:
            self._forward, self.token_to_kv_pool, self.req_to_token_pool = forward, pool, request_pool

        def init_forward_metadata(self, *_: Any, **__: Any) -> None:
            pass

        def forward(
            self,
            q: Any,
            k: Any,
            v: Any,
            layer: Any,
            batch: Any,
            save_kv_cache: bool = True,
            sinks: Any = None,
            **unknown: Any,
        ) -> Any:
            given = sorted(name for name, value in unknown.items() if value is not None)
            if given:
                raise TypeError(f"layer {layer.layer_id} attends with {', '.join(given)}, which a3 does not know")
            return self._forward(q, k, v, layer, sinks)

    return A3Attention


@contextmanager
def eager_prefill(runner: Any) -> Iterator[None]:
    """Run extends eagerly inside this context, even if SGLang has captured the prefill as a CUDA graph."""
    captured = runner.prefill_cuda_graph_runner
    runner.prefill_cuda_graph_runner = None
    try:
        yield
    finally:
        runner.prefill_cuda_graph_runner = captured


def attention_override(backend: Any) -> Any:
    """A context in which the model's layers attend through ``backend``."""
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    return forward_context(ForwardContext(attn_backend=backend))
