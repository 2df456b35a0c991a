"""Row attention as paged attention over what all rows of a tile attend to, plus the project's kernel for the rest.

The rows of a request are sorted by position, so those of a tile are close to each other in the prompt, and nearly all
that they attend to is what the first of them does. Over that much context they need no mask: any library's paged
attention computes it, with a tile as a sequence. What is left, a few hundred positions, is the only part with a mask.
In layers with sliding windows or logit caps the project's kernel does everything; it also adds attention sinks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from a3_sglang.attention.base import AttentionSpec, RequestRows, RowAttention, RowAttentionFn

TILE_LANES = 128
"""Rows times query heads per KV head of a tile; what the libraries compute in one program, too."""

PagedFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec], Any]
"""Attention of all rows over what the first row of their tile attends to: ``(query, keys, values, spec) -> start``,
a :class:`a3_sglang.kernels.row_attention.Start`; arguments as in :data:`RowAttentionFn`."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """The tiles of a pass as sequences of a paged attention with one slot per page; made without a host-device sync.

    Attributes:
        row_ends: int32 (tiles + 1,), on the host: bounds of each tile's rows.
        lengths: int32 (tiles,): context that each tile attends to here, all that its first row does; at least 1.
        requests: of each tile, on the host.
        slots: int64 (context,) of each request.
    """

    row_ends: torch.Tensor
    lengths: torch.Tensor
    requests: list[int]
    slots: list[torch.Tensor]

    @classmethod
    def of(cls, requests: Sequence[RequestRows], step: int) -> Sequences:
        """Cut the rows of requests into tiles of ``step`` rows."""
        ends, owners = [0], []
        for i, request in enumerate(requests):
            cuts = [*range(request.begin, request.end, step), request.end]
            ends += cuts[1:]
            owners += [i] * (len(cuts) - 1)
        # A tile's first row is the one that attends to least.
        lengths = torch.cat([request.kv_lens[::step] for request in requests]).int()
        return cls(torch.tensor(ends, dtype=torch.int32), lengths, owners, [request.slots for request in requests])

    @property
    def max_rows(self) -> int:
        """Rows of the largest tile."""
        return int(self.row_ends.diff().max())


class PagedRowAttention(RowAttention):
    """Row attention whose unmasked part a library computes."""

    @abstractmethod
    def plan_paged(self, sequences: Sequences, heads: int, kv_heads: int, dtype: torch.dtype) -> PagedFn:
        """Plan the library's part of one pass, for all layers at once.

        Args:
            sequences: the tiles.
            heads: query heads per layer.
            kv_heads: KV heads per layer.
            dtype: of query, keys and values.
        """

    def plan(self, requests: Sequence[RequestRows], heads: int, kv_heads: int, dtype: torch.dtype) -> RowAttentionFn:
        from a3_sglang.kernels.row_attention import default_shape, make_tiles, row_attention

        group = heads // kv_heads
        start = self.plan_paged(Sequences.of(requests, TILE_LANES // group), heads, kv_heads, dtype)
        counts, slots = [r.end - r.begin for r in requests], [r.slots for r in requests]
        shape = default_shape()
        assert shape.block_m == TILE_LANES
        tiles = make_tiles(counts, slots, [r.kv_lens for r in requests], group, shape)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
            # In a window, rows of a tile have few positions in common. Caps are too rare to pass to each library.
            whole = spec.window is not None or spec.logit_cap
            return row_attention(query, keys, values, tiles, spec, None if whole else start(query, keys, values, spec))

        return attend
