"""References of the tests: plain float64 arithmetic, and a small Llama without SGLang."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from a3_sglang.attention.base import AttentionSpec
from a3_sglang.fusion.interface import AttentionHook, Model, StopForward
from a3_sglang.matching.plan import Plan, question_ranges
from a3_sglang.rope import RopeTable

# The tensors of these tests are tiny, so more threads would only cost time.
torch.set_num_threads(1)


LAYOUTS: dict[str, st.SearchStrategy[Any]] = {
    "heads": st.integers(1, 3),
    "dims": st.sampled_from([(8, 8), (16, 16), (16, 8), (12, 6), (20, 12)]),
    "neox": st.booleans(),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
}
"""KV pools: heads, (head_dim, rotary_dim), pairing of the rotary dimensions, dtype."""


def random_tensor(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- RoPE


def inverse_frequencies(rotary_dim: int, base: float = 10_000.0) -> torch.Tensor:
    """Angle per position of each pair, float64 (rotary_dim / 2,)."""
    return base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def llama3_frequencies(rotary_dim: int, base: float = 500_000.0) -> torch.Tensor:
    """Llama 3.1's angles: low frequencies divided by eight, high ones unchanged, a ramp between them."""
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    freq = inverse_frequencies(rotary_dim, base)
    ramp = ((original * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return freq * (ramp + (1 - ramp) / factor)


def cos_sin(freq: torch.Tensor, positions: int, scale: float = 1.0) -> torch.Tensor:
    """Cosines, then sines, of every position, times ``scale``, float64 (positions, rotary_dim)."""
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], -1) * scale


def rope64(x: torch.Tensor, cos_sin_rows: torch.Tensor, neox: bool) -> torch.Tensor:
    """Multiply each pair of (n, heads, head_dim) by its complex number; one row of ``cos_sin_rows`` per row."""
    half = cos_sin_rows.shape[1] // 2
    factor = torch.complex(*cos_sin_rows.double().split(half, -1)).unsqueeze(1)
    part, rest = x.double().split([2 * half, x.shape[-1] - 2 * half], -1)
    if neox:
        rotated = torch.complex(part[..., :half].contiguous(), part[..., half:].contiguous()) * factor
        return torch.cat([rotated.real, rotated.imag, rest], -1)
    rotated = torch.view_as_complex(part.unflatten(-1, (half, 2)).contiguous()) * factor
    return torch.cat([torch.view_as_real(rotated).flatten(-2), rest], -1)


def backwards(cos_sin_rows: torch.Tensor) -> torch.Tensor:
    """The inverse rotations, for :func:`rope64`."""
    cos, sin = cos_sin_rows.chunk(2, -1)
    return torch.cat([cos, -sin], -1)


# ---- attention


def weights64(query: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Attention of (rows, heads, d) over those of (n, kv_heads, d) that are seen, float64 (rows, heads, n).

    Args:
        query: (rows, heads, d).
        keys: (n, kv_heads, d); keys that no row sees may be NaN.
        seen: bool (rows, n); at least one per row.
        spec: how the layer attends; its window is in ``seen``.
    """
    heads = query.shape[1]
    keys = keys.double().nan_to_num().repeat_interleave(heads // keys.shape[1], 1)
    logits = torch.einsum("rhd,nhd->rhn", query.double(), keys) * spec.scaling
    if spec.logit_cap:
        logits = spec.logit_cap * torch.tanh(logits / spec.logit_cap)
    logits = logits.masked_fill(~seen[:, None], -math.inf)
    if spec.sinks is None:
        return torch.softmax(logits, -1)
    sinks = spec.sinks.double()[None, :, None].expand(len(query), -1, 1)
    return torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1]


def seen_by(kv_lens: torch.Tensor, n: int, window: int | None) -> torch.Tensor:
    """Which of n positions each row sees that attends to its first ``kv_lens``, bool (rows, n)."""
    distance = kv_lens[:, None] - 1 - torch.arange(n)
    return (distance >= 0) & (distance <= (n if window is None else window))


def attention64(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kv_lens: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """Attention of (rows, heads, d) over the first ``kv_lens`` of (n, kv_heads, d), float64 in the shape of ``query``.

    Keys and values that no row attends to may be NaN.
    """
    weights = weights64(query, keys, seen_by(kv_lens, len(keys), spec.window), spec)
    values = values.double().nan_to_num().repeat_interleave(query.shape[1] // values.shape[1], 1)
    return torch.einsum("rhn,nhd->rhd", weights, values)


@st.composite
def specs(draw: st.DrawFn, heads: int, scaling: st.SearchStrategy[float]) -> AttentionSpec:
    """How a layer attends: plainly as often as not."""
    plain = draw(st.booleans())
    window = None if plain else draw(st.sampled_from([None, 0, 3, 40, 300]))
    cap = 0.0 if plain else draw(st.sampled_from([0.0, 2.0]))
    sinks = None if plain or draw(st.booleans()) else torch.linspace(-2, 3, heads)
    return AttentionSpec(draw(scaling), window, cap, sinks)


# ---- a model

EPSILON = 1e-5


@dataclass(frozen=True)
class Shape:
    """Size of the small Llama."""

    depth: int = 4
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    inner: int = 48
    vocabulary: int = 101
    positions: int = 512
    base: float = 10_000.0


class Llama(Model):
    """RMSNorm, RoPE, GQA and SwiGLU over a pool of KV slots, in float32 with random weights or those of a folder.

    Every slot starts as NaN, so reading a slot before it is written shows. ``computed`` counts rows whose QKV was
    computed, summed over layers. Unless it is ``plain``, every second layer has a sliding window, logits are capped,
    and heads have attention sinks.
    """

    def __init__(self, seed: int = 0, slots: int = 1024, shape: Shape = Shape(), plain: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.depth, self.computed = shape, shape.depth, 0
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.weights: dict[str, torch.Tensor] = {"embed": random_tensor(generator, shape.vocabulary, shape.hidden)}
        for layer in range(shape.depth):
            for name, out, into in (
                ("q", width, shape.hidden),
                ("k", kv_width, shape.hidden),
                ("v", kv_width, shape.hidden),
                ("o", shape.hidden, width),
                ("gate", shape.inner, shape.hidden),
                ("up", shape.inner, shape.hidden),
                ("down", shape.hidden, shape.inner),
            ):
                # Attention is sharp enough that a wrong key or position shows in everything computed from it.
                gain = 1.5 if name in "qk" else 1.0
                self.weights[f"{name}{layer}"] = gain * random_tensor(generator, out, into) / into**0.5
            for norm in ("attention", "mlp"):
                self.weights[f"{norm}{layer}"] = 1 + 0.1 * random_tensor(generator, shape.hidden)
        self.weights = {name: weight.float() for name, weight in self.weights.items()}
        self.neox, scaling = True, shape.head_dim**-0.5
        self.windows = [None if plain or layer % 2 else 10 + 30 * layer for layer in range(shape.depth)]
        extra: dict[str, Any] = {} if plain else {"logit_cap": 3.0, "sinks": torch.linspace(-1, 2, shape.heads)}
        self.specs = [AttentionSpec(scaling, window, **extra) for window in self.windows]
        table = RopeTable(cos_sin(inverse_frequencies(shape.head_dim, shape.base), shape.positions).float(), self.neox)
        self.ropes = dict.fromkeys(range(shape.depth), table)
        pool = (slots, shape.kv_heads, shape.head_dim)
        self.keys = [torch.full(pool, torch.nan) for _ in range(shape.depth)]
        self.values = [torch.full(pool, torch.nan) for _ in range(shape.depth)]
        self._override: tuple[torch.Tensor, torch.Tensor, AttentionHook] | None = None

    @classmethod
    def load(cls, folder: Path, positions: int = 2048) -> Llama:
        """A model that transformers saved, without KV slots."""
        config = json.loads((folder / "config.json").read_text())
        shape = Shape(
            depth=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["hidden_size"] // config["num_attention_heads"],
            inner=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            positions=positions,
            base=config["rope_parameters"]["rope_theta"],
        )
        assert math.isclose(config["rms_norm_eps"], EPSILON, rel_tol=1e-3)
        model = cls(slots=0, shape=shape)
        stored = load_file(folder / "model.safetensors")
        names = {"embed": "embed_tokens"}
        for layer in range(shape.depth):
            names |= {f"{n}{layer}": f"layers.{layer}.self_attn.{n}_proj" for n in "qkvo"}
            names |= {f"{n}{layer}": f"layers.{layer}.mlp.{n}_proj" for n in ("gate", "up", "down")}
            names[f"attention{layer}"] = f"layers.{layer}.input_layernorm"
            names[f"mlp{layer}"] = f"layers.{layer}.post_attention_layernorm"
        for name, long in names.items():
            weight = stored[f"model.{long}.weight"].float()
            assert weight.shape == model.weights[name].shape
            model.weights[name] = weight
        return model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> None:
        with suppress(StopForward):
            self.hidden(tokens, positions, attend)

    @contextmanager
    def prepending(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> Iterator[None]:
        self._override = tokens, positions, attend
        yield
        self._override = None

    def extend(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """An engine's ordinary forward of a tail, within :meth:`prepending`; the last hidden states."""
        assert self._override is not None
        first, at, attend = self._override
        return self.hidden(torch.cat([first, tokens]), torch.cat([at, positions]), attend)[len(first) :]

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attend: AttentionHook) -> torch.Tensor:
        shape, w = self.shape, self.weights
        x = w["embed"][tokens]
        rope = self.ropes[0].cos_sin[positions]
        for layer in range(shape.depth):
            h = _norm(x, w[f"attention{layer}"])
            q, k, v = ((h @ w[f"{name}{layer}"].T).unflatten(-1, (-1, shape.head_dim)) for name in ("q", "k", "v"))
            q, k = (rope64(part, rope, self.neox).float() for part in (q, k))
            self.computed += len(tokens)
            out = attend.attend(layer, q, k, v, self.specs[layer])
            x = x + out.flatten(1) @ w[f"o{layer}"].T
            x = x + _mlp(x, w, layer)
        return x

    # ---- in float64, from the definition

    def rows64(
        self,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        correct: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Compute ``rows`` of a prompt over given KV of the other positions.

        Args:
            tokens: int64 (prompt,).
            rows: int64, ascending positions.
            keys: (prompt, kv_heads, head_dim) per layer; NaN at positions without KV, which no row attends to.
            values: like ``keys``.
            correct: called with each layer's number, its given keys and values, and the same with those of ``rows``
                in place, which it may change before any row attends.
            positions: int64 (rows,), the rows' positions for RoPE; None: ``rows``.

        Returns:
            Keys and values with those of ``rows`` in place, the rows' last hidden states, and per layer the attention
            weights, (rows, heads, prompt), and the queries, (rows, heads, head_dim).
        """
        shape, w = self.shape, {name: weight.double() for name, weight in self.weights.items()}
        keys, values = [k.double().clone() for k in keys], [v.double().clone() for v in values]
        x, attention, queries = w["embed"][tokens[rows]], [], []
        row_pos, column_pos = rows if positions is None else positions, torch.arange(len(tokens))
        column_pos = column_pos.index_copy(0, rows, row_pos)
        rope = self.ropes[0].cos_sin[row_pos]
        for layer in range(shape.depth):
            h = _norm(x, w[f"attention{layer}"])
            q, k, v = ((h @ w[f"{name}{layer}"].T).unflatten(-1, (-1, shape.head_dim)) for name in ("q", "k", "v"))
            given = keys[layer].clone(), values[layer].clone()
            q, keys[layer][rows], values[layer][rows] = rope64(q, rope, self.neox), rope64(k, rope, self.neox), v
            if correct is not None:
                correct(layer, *given, keys[layer], values[layer])
            queries.append(q)
            # A position without KV is absent: it counts neither as key nor as value.
            absent = keys[layer].isnan().flatten(1).any(1) | values[layer].isnan().flatten(1).any(1)
            seen, window = (torch.arange(len(tokens)) <= rows[:, None]) & ~absent, self.windows[layer]
            if window is not None:
                seen &= column_pos >= row_pos[:, None] - window
            attention.append(weights64(q, keys[layer], seen, self.specs[layer]))
            group = shape.heads // shape.kv_heads
            out = torch.einsum("rhn,nhd->rhd", attention[-1], values[layer].nan_to_num().repeat_interleave(group, 1))
            x = x + out.flatten(1) @ w[f"o{layer}"].T
            x = x + _mlp(x, w, layer)
        return keys, values, x, attention, queries

    def question64(
        self, plan: Plan, tokens: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Attention of a prompt's question, placed after all positions that have KV.

        Args:
            plan: of the prompt.
            tokens: int64 (prompt,).
            keys: (prompt, kv_heads, head_dim) per layer; NaN at positions that have no KV.
            values: like ``keys``.

        Returns:
            Per layer, float64 (rows, heads, plan.end).
        """
        asked = torch.cat([tokens[start:end] for start, end in question_ranges(plan, len(tokens))])
        unknown = torch.full((len(asked), *keys[0].shape[1:]), torch.nan, dtype=keys[0].dtype)
        keys, values = ([torch.cat([layer[: plan.end], unknown]) for layer in part] for part in (keys, values))
        rows = plan.end + torch.arange(len(asked))
        positions = torch.arange(len(tokens) - len(asked), len(tokens))
        attention = self.rows64(torch.cat([tokens[: plan.end], asked]), rows, keys, values, positions=positions)[3]
        return [layer[..., : plan.end] for layer in attention]

    def prefill64(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """KV of every layer and the last hidden states of a whole prompt."""
        shape = (self.depth, len(tokens), self.shape.kv_heads, self.shape.head_dim)
        empty = list(torch.full(shape, torch.nan, dtype=torch.float64))
        return self.rows64(tokens, torch.arange(len(tokens)), empty, empty)[:3]


def reused(plan: Plan) -> torch.Tensor:
    """Positions of a plan's reused rows."""
    return torch.cat([torch.arange(span.start, span.end) for span in plan.spans])


def gaps(plan: Plan) -> torch.Tensor:
    """Positions of a plan's gaps."""
    return torch.cat([torch.arange(0), *(torch.arange(*gap) for gap in plan.gap_ranges())])


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight


def _mlp(x: torch.Tensor, w: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    h = _norm(x, w[f"mlp{layer}"])
    return (torch.nn.functional.silu(h @ w[f"gate{layer}"].T) * (h @ w[f"up{layer}"].T)) @ w[f"down{layer}"].T
