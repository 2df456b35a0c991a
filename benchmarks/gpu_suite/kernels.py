"""Times of all kernels against what the card can do at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from a3_sglang.attention.base import AttentionSpec, ProbeRows, RequestRows
from a3_sglang.attention.registry import ROW_ATTENTION
from a3_sglang.drift.model import DEFAULT, cut_blocks
from a3_sglang.drift.selection import select_by_kernels
from a3_sglang.fusion.ops import TritonOps
from a3_sglang.kernels.row_attention import TileShape, make_tiles, row_attention
from gpu_suite.card import DEVICE, DTYPE, milliseconds
from gpu_suite.case import DIM, HEADS, KV_HEADS, LAYERS, PROBE_ROWS, TOLERANCE, Case, relative_error

TILE_SHAPES = [
    TileShape(*shape) for shape in ((128, 64, 8, 3), (128, 128, 8, 5), (128, 32, 8, 5), (64, 64, 4, 3), (64, 64, 4, 5))
]
"""Tile shapes of row attention to compare with the default: block_m, block_n, num_warps, num_stages."""


def times(context: int, limit: dict[str, float], small: bool) -> list[dict[str, Any]]:
    """Time and floor of each kernel, for one layer of one request; the copy is of all layers."""
    ops, rows = TritonOps(), []
    size = torch.finfo(DTYPE).bits // 8
    layers = 2 if small else LAYERS
    case = Case(context, 0.15, layers)
    row_bytes = 2 * KV_HEADS * DIM * size

    def add(name: str, run: Callable[[], Any], moved: float, operations: float) -> None:
        floor = max(moved / limit["bytes"], operations / limit["flops"]) * 1e3
        took = milliseconds(run)
        rows.append({"kernel": name, "context": context, "ms": took, "floor_ms": floor, "of_floor": floor / took})

    pools, spec = ops.pools(case.keys, case.values), AttentionSpec(DIM**-0.5)
    moved = 2 * context * row_bytes * layers
    add("copy, all layers", lambda: ops.copy(pools, case.slots, case.other, case.rotation, True), moved, 0)

    probe = ops.probe_attention.plan([ProbeRows.after(case.slots, PROBE_ROWS)], HEADS, KV_HEADS)
    scores, pair = torch.zeros(context, device=DEVICE), (case.keys[0], case.values[0])
    operations = 4 * PROBE_ROWS * HEADS * DIM * context
    add("probe", lambda: probe(case.probe, case.own, pair, spec, None), context * row_bytes, operations)
    ranked = context * row_bytes * 3 / 2, operations * 3 / 2
    add("probe and relevance", lambda: probe(case.probe, case.own, pair, spec, scores), *ranked)

    observed = case.observed()
    correct = ops.plan_drift_correction(DEFAULT, [observed], DTYPE)
    # Pools are read and written; each weight costs a multiply-add per element, for keys and for values.
    moved, operations = 2 * context * row_bytes, 4 * context * observed_per_block(case) * KV_HEADS * DIM
    add("drift correction", lambda: correct(pair, case.fresh, case.rope), moved, operations)
    add("drift weights, once per pass", lambda: ops.plan_drift_correction(DEFAULT, [observed], DTYPE), 0, 0)
    weight = torch.rand(context, device=DEVICE)
    add(
        "select, once per prompt",
        lambda: select_by_kernels(DEFAULT, [weight], [observed.lengths], [len(case.rows)]),
        0,
        0,
    )

    operations = 4 * HEADS * DIM * int((case.rows + 1).sum())
    for name, attend in row_attentions(case):
        add(name, attend, context * row_bytes, operations)
    return rows


def observed_per_block(case: Case) -> float:
    """Mean number of rows that a reused row is predicted from."""
    cuts = cut_blocks(case.observed().lengths)
    return len(case.rows) / len(cuts)


def row_attentions(case: Case) -> list[tuple[str, Callable[[], Any]]]:
    """Our kernel with several tile shapes, and on a GPU the ways of libraries to compute the same rows."""
    count, context = len(case.rows), len(case.slots)
    request = RequestRows(0, count, case.slots, case.rows + 1, False)
    spec, pair = AttentionSpec(DIM**-0.5), (case.keys[0], case.values[0])
    attend = TritonOps().row_attention.plan([request], HEADS, KV_HEADS, DTYPE)
    ways: list[tuple[str, Callable[[], Any]]] = [("row attention", lambda: attend(case.query, *pair, spec))]
    for shape in TILE_SHAPES:
        tiles = make_tiles([count], [case.slots], [case.rows + 1], HEADS // KV_HEADS, shape)
        name = f"  {shape.block_m} x {shape.block_n}, warps {shape.num_warps}, stages {shape.num_stages}"
        ways.append((name, lambda tiles=tiles: row_attention(case.query, *pair, tiles, spec)))
    if DEVICE == "cpu":
        return ways
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    pools = case.keys[0].unsqueeze(1), case.values[0].unsqueeze(1)
    exact = ways[0][1]()

    def wrapper(queries: list[int], contexts: list[torch.Tensor]) -> Callable[[], Any]:
        planned = BatchPrefillWithPagedKVCacheWrapper(torch.empty(2**28, dtype=torch.uint8, device=DEVICE), "NHD")
        lengths = torch.tensor([0, *map(len, contexts)], dtype=torch.int32)
        planned.plan(
            torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            lengths.cumsum(0, dtype=torch.int32),
            torch.cat(contexts).int(),
            torch.ones(len(contexts), dtype=torch.int32),
            HEADS,
            KV_HEADS,
            DIM,
            1,
            causal=True,
            q_data_type=DTYPE,
        )
        return lambda: planned.run(case.query, pools)

    def tiled(name: str) -> Callable[[], Any]:
        planned = ROW_ATTENTION[name](torch.device(DEVICE)).plan([request], HEADS, KV_HEADS, DTYPE)
        return lambda: planned(case.query, *pair, spec)

    positions = case.rows.tolist()
    starts = [i for i, p in enumerate(positions) if not i or p != positions[i - 1] + 1]
    runs = [end - begin for begin, end in zip(starts, [*starts[1:], count], strict=True)]
    contexts = [case.slots[: positions[begin] + n] for begin, n in zip(starts, runs, strict=True)]
    candidates = {
        "tiles by FlashAttention 3, and the rest": lambda: tiled("fa3"),
        "tiles by FlashInfer, and the rest": lambda: tiled("flashinfer"),
        "FlashInfer, runs as sequences": lambda: wrapper(runs, contexts),
    }
    for name, make in candidates.items():
        try:
            run = make()
            wrong = relative_error(run(), exact.double())
        except Exception as reason:  # That a way does not work is a result, too.
            print(f"{name}: {type(reason).__name__}: {reason}")
            continue
        if wrong < TOLERANCE:
            ways.append((name, run))
        else:
            print(f"{name}: differs from our kernel by {wrong:.3g}")
    # One causal prefill after an exact prefix, with as many rows and operations: the best that FlashInfer can do.
    dense = wrapper([count], [case.slots[: context // 2 + count // 2]])
    return [*ways, ("FlashInfer, as many causal rows", dense)]
