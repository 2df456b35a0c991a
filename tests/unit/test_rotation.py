"""Moved keys against float64 RoPE, and the start check against SGLang's own rotary modules."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from a3_sglang.rope import RopeTable, copy_rotated, rotate
from helpers.reference import cos_sin, inverse_frequencies, llama3_frequencies, random_tensor, rope64

POSITIONS = 4096
# (angle of each pair, scale of the table), as the rope kinds of Llama models have them.
KINDS: dict[str, Callable[[int], tuple[torch.Tensor, float]]] = {
    "default": lambda dim: (inverse_frequencies(dim), 1.0),
    "linear": lambda dim: (inverse_frequencies(dim) / 4, 1.0),
    "llama3": lambda dim: (llama3_frequencies(dim), 1.0),
    "yarn": lambda dim: (inverse_frequencies(dim) / torch.linspace(1, 8, dim // 2).double(), 1.2079),
}


@st.composite
def moves(draw: st.DrawFn) -> tuple[torch.Tensor, RopeTable, torch.Tensor, torch.Tensor]:
    """Keys before RoPE, a table, and old and new positions."""
    rotary_dim = draw(st.sampled_from([2, 8, 32, 64]))
    head_dim = rotary_dim + draw(st.sampled_from([0, 0, 6, 32]))
    rows, heads = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    freq, scale = KINDS[draw(st.sampled_from(sorted(KINDS)))](rotary_dim)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    table = RopeTable(cos_sin(freq, POSITIONS, scale).to(dtype), draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    old, new = torch.randint(0, POSITIONS, (2, rows), generator=generator)
    return random_tensor(generator, rows, heads, head_dim), table, old, new


@settings(max_examples=150, deadline=None)
@given(moves())
def test_moved_keys_equal_keys_rotated_at_the_new_position(move):
    raw, table, old, new = move
    stored = rope64(raw, table.cos_sin[old], table.neox).float()
    turned = rotate(stored, *table.turn(old, new), table.neox)
    assert turned.dtype == torch.float32
    assert_close(turned.double(), rope64(raw, table.cos_sin[new], table.neox), rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(moves())
def test_bf16_keys_are_rounded_once(move):
    raw, table, old, new = move
    stored = rope64(raw, table.cos_sin[old], table.neox).bfloat16()
    turn = table.turn(old, new)
    turned = rotate(stored, *turn, table.neox)
    assert turned.dtype == torch.bfloat16
    exact = rope64(stored, torch.cat(turn, -1), table.neox)
    # Half a unit in the last of 8 bits; fp32 arithmetic may tip a tie.
    assert_close(turned.double(), exact, rtol=2**-8 * 1.001, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("neox", [True, False])
def test_moved_keys_have_the_true_angle(kind, neox):
    """The table aside: from the definition, every pair is turned by (new - old) times its frequency."""
    freq, scale = KINDS[kind](64)
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    raw = random_tensor(generator, 30, 2, 64)
    old, new = torch.randint(0, POSITIONS, (2, 30), generator=generator)
    table = RopeTable(cos_sin(freq, POSITIONS, scale).float(), neox)
    turned = rotate(raw.float(), *table.turn(old, new), neox)
    angle = (new - old)[:, None] * freq
    assert_close(turned.double(), rope64(raw, torch.cat([angle.cos(), angle.sin()], -1), neox), rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(moves())
def test_there_and_back(move):
    raw, table, old, new = move
    keys = raw.float()
    there = rotate(keys, *table.turn(old, new), table.neox)
    assert_close(rotate(there, *table.turn(new, old), table.neox), keys, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(moves(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_key_that_stays_is_bit_equal(move, dtype):
    raw, table, old, _ = move
    assert_close(rotate(raw.to(dtype), *table.turn(old, old), table.neox), raw.to(dtype), rtol=0, atol=0)


@settings(max_examples=50, deadline=None)
@given(moves(), st.integers(0, 2**32))
def test_copy_touches_only_its_targets(move, seed):
    raw, table, old, new = move
    rows = len(old)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(3 * rows, generator=generator)
    source, target, others = places.split([rows, rows, rows])
    before = random_tensor(generator, 2, 3 * rows, *raw.shape[1:]).float()
    before[:, others[0]] = torch.nan
    keys, values = before.clone()
    copy_rotated(keys, values, source, target, table.turn(old, new), table.neox)
    untouched = torch.cat([source, others])
    assert_close(keys[untouched], before[0, untouched], rtol=0, atol=0, equal_nan=True)
    assert_close(values[untouched], before[1, untouched], rtol=0, atol=0, equal_nan=True)
    assert_close(values[target], before[1, source], rtol=0, atol=0)
    exact = rope64(before[0, source], torch.cat(table.turn(old, new), -1), table.neox)
    assert_close(keys[target].double(), exact, rtol=1e-5, atol=1e-5)


# ---- SGLang's modules

SGLANG_KINDS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
}


@pytest.fixture(scope="module")
def make_rope() -> Iterator[Callable[..., Any]]:
    """SGLang's rotary module of a kind; a copy, as SGLang shares one module between equal calls."""
    pytest.importorskip("sglang")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    from sglang.srt.layers.rotary_embedding import base, get_rope

    def make(kind: str = "default", neox: bool = True, rotary_dim: int = 64, dtype: torch.dtype = torch.bfloat16):
        with torch.device(device):
            return copy.deepcopy(get_rope(64, rotary_dim, 8192, 10_000, neox, SGLANG_KINDS[kind], dtype))

    with pytest.MonkeyPatch.context() as patch:
        # Some releases ask for the options of a server, of which there is none here.
        options = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
        patch.setattr(base, "get_exec", lambda: options)
        yield make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_dim", [64, 32])
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("kind", sorted(SGLANG_KINDS))
def test_start_check_accepts(make_rope, kind, neox, rotary_dim, dtype):
    from a3_sglang.integration.model import ROTARY_CLASSES, check_rotation

    module = make_rope(kind, neox, rotary_dim, dtype)
    assert type(module).__name__ in ROTARY_CLASSES
    check_rotation(module, 64, dtype)


class Disguised:
    """A rotary module that shows another table or pairing than the one it multiplies with."""

    def __init__(self, module: Any, table: torch.Tensor, neox: bool) -> None:
        self._module, self.cos_sin_cache, self.is_neox_style = module, table, neox

    def __call__(self, *args: torch.Tensor) -> Any:
        return self._module(*args)


def longer(table: torch.Tensor) -> torch.Tensor:
    """Angles of a table whose positions are two percent further apart."""
    return cos_sin(inverse_frequencies(table.shape[1]) * 1.02, len(table)).to(table)


def one_pair_backwards(table: torch.Tensor) -> torch.Tensor:
    table = table.clone()
    table[:, table.shape[1] // 2] *= -1
    return table


@pytest.mark.parametrize(
    "tamper",
    [longer, one_pair_backwards, torch.zeros_like, lambda table: table.flip(1), lambda table: table.roll(1, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_check_refuses_a_tampered_table(make_rope, tamper, dtype):
    from a3_sglang.fusion.interface import UnsupportedModelError
    from a3_sglang.integration.model import check_rotation

    module = make_rope(dtype=dtype)
    check_rotation(Disguised(module, module.cos_sin_cache, True), 64, dtype)
    with pytest.raises(UnsupportedModelError, match="differ from the model's own"):
        check_rotation(Disguised(module, tamper(module.cos_sin_cache), True), 64, dtype)


def test_start_check_refuses_another_pairing(make_rope):
    from a3_sglang.fusion.interface import UnsupportedModelError
    from a3_sglang.integration.model import check_rotation

    module = make_rope()
    with pytest.raises(UnsupportedModelError, match="differ from the model's own"):
        check_rotation(Disguised(module, module.cos_sin_cache, False), 64, torch.bfloat16)
