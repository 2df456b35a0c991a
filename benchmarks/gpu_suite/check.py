"""Errors of all kernels against float64."""

from __future__ import annotations

import torch

from a3_sglang.attention.base import AttentionSpec, ProbeRows, RequestRows
from a3_sglang.drift.correction import correct_drift
from a3_sglang.fusion.ops import TritonOps
from a3_sglang.rope import rotate
from gpu_suite.card import DEVICE, DTYPE
from gpu_suite.case import DIM, HEADS, KV_HEADS, PROBE_ROWS, Case, relative_error, weights64


def errors(small: bool) -> dict[str, float]:
    """Relative error of each kernel against float64 on fresh random inputs."""
    ops, context = TritonOps(), 200 if small else 1500
    case = Case(context, 0.15, layers=2, seed=torch.seed() % 2**31)
    group, spec, found = HEADS // KV_HEADS, AttentionSpec(DIM**-0.5), {}
    k, v = (pool[0][case.slots] for pool in (case.keys, case.values))

    attend = ops.row_attention.plan(
        [RequestRows(0, len(case.rows), case.slots, case.rows + 1, False)], HEADS, KV_HEADS, DTYPE
    )
    out = attend(case.query, case.keys[0], case.values[0], spec)
    weights = weights64(case.query, k, case.rows + 1)
    v64 = v.double().repeat_interleave(group, 1)
    found["row attention"] = relative_error(out, torch.einsum("rhn,nhd->rhd", weights, v64))

    probe = ops.probe_attention.plan([ProbeRows.after(case.slots, PROBE_ROWS)], HEADS, KV_HEADS)
    scores = torch.zeros(context, device=DEVICE)
    out = probe(case.probe, case.own, (case.keys[0], case.values[0]), spec, scores)
    all_k, all_v = (torch.cat([x, own]) for x, own in zip((k, v), case.own, strict=True))
    weights = weights64(case.probe, all_k, torch.arange(PROBE_ROWS, device=DEVICE) + context + 1)
    v64 = all_v.double().repeat_interleave(group, 1)
    found["probe attention"] = relative_error(out, torch.einsum("rhn,nhd->rhd", weights, v64))
    relevance = (weights.square().mean(0).sqrt() * v64.norm(dim=-1).T).sum(0)
    found["relevance"] = relative_error(scores, relevance[:context])

    expected = [
        (rotate(keys[case.slots].double(), *(x.double() for x in case.rotation), True), values[case.slots].double())
        for keys, values in zip(case.keys, case.values, strict=True)
    ]
    ops.copy(ops.pools(case.keys, case.values), case.slots, case.other, case.rotation, True)
    found["copy"] = max(
        relative_error(pool[case.other], exact)
        for layer, pair in enumerate(expected)
        for pool, exact in zip((case.keys[layer], case.values[layer]), pair, strict=True)
    )

    correction = case.correction()
    pools = case.keys[0], case.values[0]
    corrected, before = [pool.to(torch.float32, copy=True) for pool in pools], [pool.double() for pool in pools]
    correct_drift(tuple(corrected), case.fresh, correction, case.rope)
    ops.correct_drift(pools, case.fresh, correction, case.rope)
    # Errors relative to the correction, which is smaller than the KV; both are rounded to the pool's dtype.
    found["drift correction"] = max(
        relative_error(after.double() - was, exact.to(DTYPE).double() - was)
        for after, exact, was in zip(pools, corrected, before, strict=True)
    )
    return found
