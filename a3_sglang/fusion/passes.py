"""Forward passes on selected rows: the probe, the first layers of all rows, and the recompute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from a3_sglang.attention.base import AttentionSpec, ProbeFn, ProbeRows, RequestRows, RowAttentionFn
from a3_sglang.drift.correction import ObservedRows
from a3_sglang.fusion.interface import AttentionHook, Model, StopForward
from a3_sglang.fusion.ops import Ops
from a3_sglang.fusion.request import FusionRequest, Slice
from a3_sglang.matching.plan import question_ranges
from a3_sglang.selectors import DenseLayer, ProbeLayers


class ProbePass(AttentionHook):
    """Attention of the questions of some requests over their prefixes and copied spans.

    A question's rows get the prompt's last positions, wherever the question is, so that they follow all known context.
    They do not attend to the rest of gaps and tail, have no slots and write no KV. The pass ends after the last layer
    that is read.

    Args:
        model: runs the pass.
        ops: how questions attend.
        requests: one question each; the size of the probe is noted on them.
        needs: whose attention is read, and how.

    Attributes:
        tokens, positions: int64 (rows,), of the pass.
    """

    def __init__(self, model: Model, ops: Ops, requests: Sequence[FusionRequest], needs: ProbeLayers) -> None:
        self._model, self._ops = model, ops
        self._requests, self._needs, self._layers = requests, needs, needs.layers(model.windows)
        self._questions: list[ProbeRows] = []
        self._anchored: list[ProbeRows] = []
        self._known_pos, tokens, positions, row = [], [], [], 0
        for request in requests:
            device, end = request.slots.device, len(request.tokens)
            asked = [request.tokens[start:stop] for start, stop in question_ranges(request.plan, end, request.question)]
            rows = sum(map(len, asked))
            request.probed_rows, request.probed_layers = rows, self._layers[-1] + 1
            prefix_pos = torch.arange(request.plan.prefix, device=device)
            known_pos = torch.cat([prefix_pos, request.reused_rows().positions])
            self._known_pos.append(known_pos)
            row_pos = torch.arange(end - rows, end, device=device)
            self._questions.append(ProbeRows(row, row + rows, request.slots[known_pos], known_pos, row_pos))
            if needs.anchors < 1:
                anchor_pos = torch.cat([prefix_pos, *self._anchors(request)])
                self._anchored.append(ProbeRows(row, row + rows, request.slots[anchor_pos], anchor_pos, row_pos))
            tokens += asked
            positions.append(row_pos)
            row += rows
        self.tokens = torch.cat(tokens)
        self.positions = torch.cat(positions)
        self._relevance = torch.zeros(sum(map(len, self._known_pos)), device=self.positions.device)
        self._runs: tuple[ProbeFn, ProbeFn] | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        if self._runs is None:
            plan = partial(self._ops.probe_attention.plan, heads=query.shape[1], kv_heads=key.shape[1])
            whole = plan(self._questions, mean=self._needs.mean)
            self._runs = whole, plan(self._anchored) if self._anchored else whole
        (whole, anchored), pools = self._runs, (self._model.keys[layer], self._model.values[layer])
        if layer in self._layers:
            out = whole(query, (key, value), pools, spec, self._relevance)
            if layer == self._layers[-1]:
                raise StopForward
            if anchored is whole:
                return out
        return anchored(query, (key, value), pools, spec, None)

    def _anchors(self, request: FusionRequest) -> Iterator[torch.Tensor]:
        """Positions of the anchors of each span, int64."""
        for span in request.plan.spans:
            slots = request.slots[span.start : span.end]
            norms = [torch.linalg.vector_norm(self._model.keys[layer][slots].float(), dim=-1) for layer in self._layers]
            count = math.ceil(self._needs.anchors * span.length)
            yield span.start + torch.stack(norms).mean((0, 2)).topk(count, largest=False).indices.sort().values

    def by_request(self) -> list[torch.Tensor]:
        """Relevance of each request's positions before its tail, float32 (plan.end,); zero in gaps."""
        parts = self._relevance.split([len(known_pos) for known_pos in self._known_pos])
        return [
            part.new_zeros(request.plan.end).index_copy_(0, known_pos, part)
            for request, known_pos, part in zip(self._requests, self._known_pos, parts, strict=True)
        ]


class DenseLayersPass(AttentionHook):
    """The first layers of all rows after one request's exact prefix, in slices by position.

    The context's KV is written to its slots; the tail's is kept until the last of these layers is read.

    Args:
        model: runs the pass.
        ops: how rows attend.
        request: whose layers are computed.
        count: number of layers.
    """

    def __init__(self, model: Model, ops: Ops, request: FusionRequest, count: int) -> None:
        self._model, self._attention, self._request = model, ops.row_attention, request
        self._last = count - 1
        self._copied = model.values[self._last].index_select(0, request.slots[request.plan.prefix :])
        self._tail: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._queries: list[torch.Tensor] = []
        self._next_pos = request.plan.prefix

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        request, begin, end = self._request, self._next_pos, self._next_pos + len(query)
        context = max(min(request.plan.end - begin, len(query)), 0)
        if context:
            self._model.store(layer, request.slots[begin : begin + context], key[:context], value[:context])
        tail = self._tail.setdefault(layer, [])
        tail.append((key[context:], value[context:]))
        if layer == self._last:
            self._queries.append(query[context:])
            self._next_pos = end
            raise StopForward
        pools = self._model.keys[layer], self._model.values[layer]
        keys, values = (
            torch.cat([pool[request.slots], *parts]) for pool, parts in zip(pools, zip(*tail, strict=True), strict=True)
        )
        # The copy above has one slot per position, so slots and positions are the same.
        kv_lens = torch.arange(begin, end, device=query.device) + 1
        rows = RequestRows(0, len(query), torch.arange(len(keys), device=query.device), kv_lens, True)
        run = self._attention.plan([rows], query.shape[1], key.shape[1], query.dtype)
        return run(query, keys, values, spec)

    def last_layer(self) -> DenseLayer:
        """The last of the layers, once all slices have run."""
        request, layer = self._request, self._last
        pools = self._model.keys[layer], self._model.values[layer]
        key, value = (
            torch.cat([pool[request.slots[request.plan.prefix :]], *parts])
            for pool, parts in zip(pools, zip(*self._tail[layer], strict=True), strict=True)
        )
        reused = request.reused_rows().positions - request.plan.prefix
        return DenseLayer(torch.cat(self._queries), key, value, self._copied, reused)


class RecomputePass(AttentionHook):
    """Rows whose KV is written to their slots before they attend: slices to recompute, then an extend's own rows.

    Of the slices nothing but the KV is needed, so they do not attend in the last layer; without other rows the pass
    ends there.

    Args:
        model: runs the pass.
        ops: how rows attend and drift is corrected.
        slices: the rows to recompute.
        extend: the rows of each request in the extend, which follow the slices; ``begin`` and ``end`` count from the
            first of them.
        extend_slots: int64 (rows of the extend,), where their KV goes.

    Attributes:
        tokens, positions: int64 (rows of the slices,).
    """

    def __init__(
        self,
        model: Model,
        ops: Ops,
        slices: Sequence[Slice],
        extend: Sequence[RequestRows] = (),
        extend_slots: torch.Tensor | None = None,
    ) -> None:
        self._model, self._ops = model, ops
        none = torch.empty(0, dtype=torch.int64, device=model.keys[0].device)
        self.tokens = torch.cat([none, *(part.request.tokens[part.pos] for part in slices)])
        self.positions = torch.cat([none, *(part.pos for part in slices)])
        written = [part.request.slots[part.pos] for part in slices]
        self._slots = torch.cat([none, *written, none if extend_slots is None else extend_slots])
        self._recomputed, observed = _plan_slices(slices)
        dtype = model.keys[0].dtype
        self._correct = ops.plan_drift_correction(model.drift, observed, dtype) if observed else None
        self._extend, self._first_row = extend, len(self.positions)
        self._run: RowAttentionFn | None = None

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        keys, values = self._model.keys[layer], self._model.values[layer]
        if layer and self._correct is not None:  # KV of layer 0 does not depend on the context, so it has no drift.
            # Observed drift is fresh minus copied KV, so this comes before the fresh KV is written.
            self._correct((keys, values), (key, value), self._model.ropes[layer])
        self._model.store(layer, self._slots, key, value)
        if layer == self._model.depth - 1 and self._recomputed:
            return self._attend_last(query, keys, values, spec)
        if self._run is None:
            first = self._first_row
            moved = [replace(rows, begin=rows.begin + first, end=rows.end + first) for rows in self._extend]
            self._run = self._plan([*self._recomputed, *moved], query, keys)
        return self._run(query, keys, values, spec)

    def _attend_last(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        """Attention of the extend's rows only; zero for the slices."""
        if not self._extend:
            raise StopForward
        out = torch.zeros_like(query)
        own = query[self._first_row :]
        out[self._first_row :] = self._plan(self._extend, query, keys)(own, keys, values, spec)
        return out

    def _plan(self, requests: Sequence[RequestRows], query: torch.Tensor, keys: torch.Tensor) -> RowAttentionFn:
        return self._ops.row_attention.plan(requests, query.shape[1], keys.shape[1], query.dtype)


def _plan_slices(slices: Sequence[Slice]) -> tuple[list[RequestRows], list[ObservedRows]]:
    """How the rows of slices attend, and whose drift is observed, by their rows in one pass."""
    requests, observed, row = [], [], 0
    for part in slices:
        request, end_row = part.request, row + len(part.pos)
        # Only the first plan.end slots are visible; the prompt's length decides how PyTorch's kernel rounds.
        unseen = request.slots[:1].expand(len(request.tokens) - request.plan.end)
        requests.append(RequestRows(row, end_row, torch.cat([request.slots, unseen]), part.pos + 1, request.exact))
        if request.selector.corrects_drift and len(request.recomputed_pos) and not request.exact:
            observed.append(
                ObservedRows(
                    [(span.start, span.end) for span in request.plan.spans],
                    request.reused_rows().positions,
                    request.slots,
                    part.pos,
                    row,
                    len(request.recomputed_pos),
                    part.begin_pos,
                    part.end_pos,
                )
            )
        row = end_row
    return requests, observed
