"""Time to first token of full and fused prefills, measured on a running engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from a3_sglang.client import Prompts, Step, flush, generate, generate_all
from a3_sglang.timing import Timings

SETTLE_SECONDS = 0.3
STAGES = Timings.PARTS
"""Stages of a fused prefill, as a request reports them with ``A3_TIMINGS=1``."""


def full_prefills(running: Any, prompts: Prompts, repeats: int, batch: int, step: Step) -> list[float]:
    """Milliseconds of ``repeats`` full prefills of stock SGLang, after one to warm up."""
    flush(running)
    times = []
    for _ in range(repeats + 1):
        times.append(_fresh(running, prompts, batch))
        step()
    return times[1:]


def fused_prefills(
    running: Any, prompts: Prompts, ratio: float, repeats: int, batch: int, step: Step
) -> list[dict[str, float]]:
    """Milliseconds of fused and full prefills in alternation, after one pair to warm up.

    Args:
        running: the engine, with a3 and ``A3_TIMINGS=1``.
        prompts: the prompts.
        ratio: recompute ratio of the fused prefills.
        repeats: number of pairs.
        batch: requests sent at once.
        step: called after each pair, the first included.

    Returns:
        For each pair: the fused prefill, each of its stages, the full prefill, and both kinds of request with
        nothing to reuse.

    Raises:
        RuntimeError: fusion did not engage.
    """
    pairs = []
    for i in range(repeats + 1):
        pairs.append(_pair(running, prompts, ratio, batch, swap=bool(i % 2)))
        step()
    return pairs[1:]


def compared_prefills(
    running: Any, prompts: Prompts, options: Sequence[Any], repeats: int, batch: int, step: Step
) -> list[list[float]]:
    """Milliseconds of prefills with each of several options, in turns over the same donor, after a round to warm up.

    Args:
        running: the engine, with a3.
        prompts: the prompts.
        options: of the requests; False: a full prefill. None of the requests leaves KV that another one reuses.
        repeats: number of rounds.
        batch: requests sent at once.
        step: called after each round, the first included.

    Returns:
        For each option, its times.

    Raises:
        RuntimeError: fusion did not engage.
    """
    times: list[list[float]] = [[] for _ in options]
    for i in range(repeats + 1):
        _donate(running, prompts)
        # The same prompts for all options, none of which leaves KV.
        targets = [prompts.shuffled() for _ in range(batch)]
        for j in range(len(options)):
            # Each round begins with the next one: a machine's speed drifts.
            k = (i + j) % len(options)
            if options[k] is False:
                times[k].append(_fresh(running, prompts, batch, False))
            else:
                option = options[k] | {"keep": False}
                times[k].append(_fused(running, targets, option)[0])
        step()
    return [measured[1:] for measured in times]


def summary(stock: list[float], pairs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians and ratios of what :func:`full_prefills` and :func:`fused_prefills` measured."""
    median = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
    full = min(statistics.median(stock), median["alternating_full_ms"])
    idle = {name: median.pop(f"idle_{name}_ms") for name in ("a3", "full")}
    return {key: round(value, 3) for key, value in median.items()} | {
        "stock_ms": round(statistics.median(stock), 3),
        "full_ms": round(full, 3),
        "speedup": round(full / median["a3_ms"], 3),
        "selection_share": round((median["probe_ms"] + median["select_ms"]) / median["a3_ms"], 4),
        "nothing_to_reuse": round(idle["a3"] / idle["full"], 4),
        "repeats_full_ms": stock,
        "repeats_a3_ms": [pair["a3_ms"] for pair in pairs],
    }


def _pair(running: Any, prompts: Prompts, ratio: float, batch: int, swap: bool) -> dict[str, float]:
    """One full prefill and one fused prefill of equally long prompts; then both with nothing to reuse."""
    _donate(running, prompts)
    targets = [prompts.shuffled() for _ in range(batch)]
    measured: dict[str, float] = {}
    for fuse in (False, True) if swap else (True, False):
        if not fuse:
            measured["alternating_full_ms"] = _fresh(running, prompts, batch, False)
            continue
        measured["a3_ms"], metas = _fused(running, targets, {"ratio": ratio})
        # Requests of one batch report the same stages; several batches run one after the other.
        batches = {tuple(meta["a3_ms"].items()) for meta in metas}
        measured |= {f"{stage}_ms": sum(dict(one)[f"{stage}_ms"] for one in batches) for stage in STAGES}
    for option in (False, None) if swap else (None, False):
        name = "idle_full_ms" if option is False else "idle_a3_ms"
        measured[name] = _fresh(running, prompts, batch, option)
    return measured


def _donate(running: Any, prompts: Prompts) -> None:
    """Draw new prompts, and leave the KV of one of them in an otherwise empty cache: an ordinary request."""
    flush(running)
    prompts.renew()
    generate(running, prompts.shuffled(), a3=False)


def _fused(running: Any, targets: list[list[int]], option: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    """What :func:`_timed` returns of a batch that has to be fused."""
    elapsed, metas = _timed(running, targets, option)
    for report in (meta["a3"] for meta in metas):
        if report["reason"] is not None or not report["reused"] + report["recomputed"]:
            raise RuntimeError(f"fusion did not engage: {report}")
    return elapsed, metas


def _timed(running: Any, prompts: list[list[int]], a3: Any) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds until all requests have their first token, and the ``meta_info`` of each."""
    # The overlap scheduler may still decode a step for the requests before.
    time.sleep(SETTLE_SECONDS)
    started = time.perf_counter()
    metas = [out["meta_info"] for out in generate_all(running, prompts, a3=a3)]
    return (time.perf_counter() - started) * 1e3, metas


def _fresh(running: Any, prompts: Prompts, batch: int, a3: bool | None = None) -> float:
    """Milliseconds of a batch of prompts of which nothing is cached."""
    elapsed, metas = _timed(running, [prompts.tokens(prompts.length) for _ in range(batch)], a3)
    # Among a hundred random prompts, two may well begin with the same token.
    if any(meta["cached_tokens"] > prompts.length // 100 for meta in metas):
        raise RuntimeError("prompts of fresh tokens were found cached")
    return elapsed
