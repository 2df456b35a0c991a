"""The attention backend that SGLang's layers call during a pass of a fusion."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from a3_sglang.integration import compat

LAYER = SimpleNamespace(layer_id=3)


def test_it_calls_what_it_was_given_and_its_class_is_made_once():
    one, other = (
        compat.attention_backend(lambda q, k, v, layer, sinks, x=x: (q + x, layer, sinks), "pool", "rows")
        for x in (1, 2)
    )
    assert isinstance(one, AttentionBackend)
    assert type(one) is type(other)
    assert (one.token_to_kv_pool, one.req_to_token_pool) == ("pool", "rows")
    zero, given = torch.zeros(2), torch.zeros(1)
    for backend, added in ((one, 1), (other, 2)):
        out, layer, sinks = backend.forward(zero, zero, zero, LAYER, None, save_kv_cache=False, sinks=given)
        assert torch.equal(out, zero + added)
        assert layer is LAYER
        assert sinks is given


def test_an_argument_that_would_change_the_result_is_refused():
    backend = compat.attention_backend(lambda *given: given, None, None)
    with pytest.raises(TypeError, match="layer 3 attends with k_rope, which a3 does not know"):
        backend.forward(None, None, None, LAYER, None, sinks=None, k_rope=torch.zeros(1))
