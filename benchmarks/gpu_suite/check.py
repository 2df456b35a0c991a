"""Errors of all kernels against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from a3_sglang.attention.base import AttentionSpec, ProbeAttention, ProbeRows, RequestRows, RowAttention
from a3_sglang.attention.registry import ROW_ATTENTION, VARIANTS
from a3_sglang.drift.correction import DriftCorrection, correct_drift
from a3_sglang.drift.model import DEFAULT, PaddedBlocks
from a3_sglang.drift.selection import select_a_optimal, select_by_kernels
from a3_sglang.fusion.ops import TritonOps
from a3_sglang.rope import rotate
from gpu_suite.card import DEVICE, DTYPE
from gpu_suite.case import DIM, HEADS, KV_HEADS, PROBE_ROWS, Case, relative_error, weights64

FAR_SLOT = 2**31 // (KV_HEADS * DIM)
"""The first slot whose elements have numbers of more than 31 bits."""


def errors(small: bool) -> dict[str, float]:
    """Relative error of each kernel against float64 on fresh random inputs.

    On a GPU kernels also run at the end of a large pool, and after a first run again with waiting for the device
    forbidden.
    """
    context, seed = 200 if small else 1500, torch.seed() % 2**31
    case = Case(context, 0.15, layers=2, seed=seed)
    found = errors_of(case) | row_attention_errors(case)
    if DEVICE == "cuda" and not small:
        with waits("error"):
            again = errors_of(Case(context, 0.15, layers=2, seed=seed + 1))
        found |= {f"{name}, no waiting": error for name, error in again.items()}
        far = Case(context, 0.15, layers=2, seed=seed, first_slot=FAR_SLOT)
        found |= {f"{name}, far slots": error for name, error in errors_of(far).items()}
    return {name: float(error) for name, error in found.items()} | {"rows selected": selection_error(context, seed)}


@contextmanager
def waits(mode: str) -> Iterator[None]:
    """A context in which a wait of the host for the device is an error ("error") or nothing special ("default")."""
    before = torch.cuda.get_sync_debug_mode() if DEVICE == "cuda" else 0
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode(before)


def specs(case: Case) -> dict[str, AttentionSpec]:
    """How layers attend, by what is added to the names of the errors."""
    scaling, sinks = DIM**-0.5, torch.linspace(-2, 3, HEADS, device=DEVICE)
    return {
        "": AttentionSpec(scaling),
        ", sinks": AttentionSpec(scaling, sinks=sinks),
        ", window, cap and sinks": AttentionSpec(scaling, len(case.slots) // 3, 5.0, sinks),
    }


def row_attention64(case: Case, spec: AttentionSpec) -> torch.Tensor:
    """Attention of the case's rows, float64 (rows, heads, head_dim)."""
    weights = weights64(case.query, case.keys[0][case.slots], case.rows + 1, spec)
    v64 = case.values[0][case.slots].double().repeat_interleave(HEADS // KV_HEADS, 1)
    return torch.einsum("rhn,nhd->rhd", weights, v64)


def row_attention_by(attention: RowAttention, case: Case, spec: AttentionSpec) -> torch.Tensor:
    """The same by a row attention."""
    request = RequestRows(0, len(case.rows), case.slots, case.rows + 1, False)
    attend = attention.plan([request], HEADS, KV_HEADS, DTYPE)
    return attend(case.query, case.keys[0], case.values[0], spec)


def row_attention_errors(case: Case) -> dict[str, torch.Tensor]:
    """Relative error of every row attention of this device."""
    found = {}
    expected = [(suffix, spec, row_attention64(case, spec)) for suffix, spec in specs(case).items()]
    for name, make in (ROW_ATTENTION | VARIANTS).items():
        try:
            attention = make(torch.device(DEVICE))
            for suffix, spec, exact in expected:
                out = row_attention_by(attention, case, spec)
                found[f"row attention by {name}{suffix}"] = relative_error(out, exact)
        except Exception as reason:  # That a library is absent, or does not work here, is a result, too.
            print(f"row attention by {name}: {type(reason).__name__}: {reason}")
    return found


def selection_error(context: int, seed: int) -> float:
    """Share of the rows that PyTorch's operations on the CPU select and the kernels do not, less a twentieth.

    Rows of nearly equal gain may be swapped, so a few are others.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(context, generator=generator).mul(2).exp()
    lengths, count = [context // 2, context - context // 2], int(0.15 * context)
    (found,) = select_by_kernels(DEFAULT, [weight.to(DEVICE)], [lengths], [count])
    expected = select_a_optimal(DEFAULT, weight, PaddedBlocks(lengths, "cpu"), count)
    return max(0.0, 0.95 - len(set(found.tolist()) & set(expected.tolist())) / count)


def probe_errors(case: Case, probe: ProbeAttention, spec: AttentionSpec) -> dict[str, torch.Tensor]:
    """Relative errors of the probe's attention and of the relevance of its context."""
    context = len(case.slots)
    attend = probe.plan([ProbeRows.after(case.slots, PROBE_ROWS)], HEADS, KV_HEADS)
    scores = torch.zeros(context, device=DEVICE)
    out = attend(case.probe, case.own, (case.keys[0], case.values[0]), spec, scores)
    k, v = (torch.cat([pool[0][case.slots], own]) for pool, own in zip((case.keys, case.values), case.own, strict=True))
    weights = weights64(case.probe, k, torch.arange(PROBE_ROWS, device=DEVICE) + context + 1, spec)
    v64 = v.double().repeat_interleave(HEADS // KV_HEADS, 1)
    relevance = (weights.square().mean(0).sqrt() * v64.norm(dim=-1).T).sum(0)
    return {
        "probe attention": relative_error(out, torch.einsum("rhn,nhd->rhd", weights, v64)),
        "relevance": relative_error(scores, relevance[:context]),
    }


def errors_of(case: Case) -> dict[str, torch.Tensor]:
    """Relative errors of the kernels, on the device."""
    ops, found = TritonOps(), dict[str, torch.Tensor]()
    for suffix, spec in specs(case).items():
        out = row_attention_by(ops.row_attention, case, spec)
        found[f"row attention{suffix}"] = relative_error(out, row_attention64(case, spec))
        found |= {name + suffix: error for name, error in probe_errors(case, ops.probe_attention, spec).items()}

    expected = [
        (rotate(keys[case.slots].double(), *(x.double() for x in case.rotation), True), values[case.slots].double())
        for keys, values in zip(case.keys, case.values, strict=True)
    ]
    # The addresses of the pools are read on the host, once per server.
    with waits("default"):
        pools = ops.pools(case.keys, case.values)
    ops.copy(pools, case.slots, case.other, case.rotation, True)
    copied = [
        relative_error(pool[case.other], exact)
        for layer, pair in enumerate(expected)
        for pool, exact in zip((case.keys[layer], case.values[layer]), pair, strict=True)
    ]
    found["copy"] = torch.stack(copied).max()

    context, observed, pools = len(case.slots), case.observed(), (case.keys[0], case.values[0])
    corrected, before = [pool[case.slots].float() for pool in pools], [pool[case.slots].double() for pool in pools]
    by_position = dataclasses.replace(observed, slots=torch.arange(context, device=DEVICE))
    correct_drift(tuple(corrected), case.fresh, DriftCorrection.plan(DEFAULT, by_position), case.rope)
    ops.plan_drift_correction(DEFAULT, [observed], DTYPE)(pools, case.fresh, case.rope)
    # Errors relative to the correction, which is smaller than the KV; both are rounded to the pool's dtype.
    changes = [
        relative_error(after[case.slots].double() - was, exact.to(DTYPE).double() - was)
        for after, exact, was in zip(pools, corrected, before, strict=True)
    ]
    found["drift correction"] = torch.stack(changes).max()
    return found
