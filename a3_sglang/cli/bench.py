"""``a3-sglang bench``: what the fused prefill gains, against stock SGLang in the same run."""

from __future__ import annotations

import platform
import statistics
import time
from typing import Annotated, Any

import typer

from a3_sglang.cli.output import Step, steps
from a3_sglang.cli.workloads import workloads
from a3_sglang.client import (
    DtypeOption,
    JsonOption,
    ModelOption,
    Prompts,
    VerboseOption,
    console,
    engine,
    environment,
    flush,
    generate,
    generate_all,
    print_table,
    resolve_dtype,
    vocabulary_of,
    write_json,
)

SETTLE_SECONDS = 0.3
PARTS = ("copy", "probe", "select", "recompute", "tail")
"""Of a fused prefill, as the requests report them."""

app = typer.Typer(no_args_is_help=True, help="Measure time to first token.")


app.command()(workloads)


@app.command()
def ttft(
    model: ModelOption,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a prompt before its question.")] = 4096,
    chunks: Annotated[int, typer.Option(min=2, help="Chunks of a prompt.")] = 8,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of reused tokens to recompute.")] = 0.15,
    repeats: Annotated[int, typer.Option(min=1, help="Measured pairs.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are sent at once.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Time to first token of shuffled chunks: stock SGLang's full prefill against a3.

    One engine at a time, as two would take each other's cores: first stock SGLang, then a3, where fused and full
    prefills (the request turns fusion off) alternate. Prefill is not chunked in either, which is stock's best
    setting. The speed-up is against the faster of the two full prefills. Of a batch it is the time until every
    request has its first token. Fails if fusion does not engage.
    """
    import sglang

    prompts = Prompts(vocabulary_of(model), context, chunks, seed)
    room = {"chunked_prefill_size": 2 * context * batch, "dtype": resolve_dtype(dtype)}
    with engine(model, None, **room) as running, steps("measuring stock", repeats + 1) as step:
        stock = full_prefills(running, prompts, repeats, batch, step)
    with (
        environment(A3_TIMINGS="1", A3_REPORT="exact"),
        engine(model, "a3", **room) as running,
        steps("measuring a3", repeats + 1) as step,
    ):
        pairs = fused_prefills(running, prompts, ratio, repeats, batch, step)
    figures = summary(stock, pairs) | {
        "context": context,
        "chunks": chunks,
        "ratio": ratio,
        "repeats": repeats,
        "batch": batch,
        "device": _device(),
        "dtype": room["dtype"],
        "sglang": sglang.__version__,
    }
    print_table(
        f"time to first token, {context} tokens in {chunks} chunks, ratio {ratio}, medians of {repeats}"
        + (f", batches of {batch}" if batch > 1 else ""),
        ("", ""),
        [
            ("full prefill", f"{figures['full_ms']:.0f} ms"),
            ("a3", f"{figures['a3_ms']:.0f} ms"),
            *((f"  {part}", f"{figures[part + '_ms']:.1f} ms") for part in PARTS),
            ("  of it selection (probe and select)", f"{figures['selection_share']:.1%}"),
            ("speed-up", f"{figures['speedup']:.2f}x"),
            ("nothing to reuse, a3 / stock", f"{figures['nothing_to_reuse']:.3f}"),
        ],
    )
    console.print(f"{figures['device']}, SGLang {sglang.__version__}, {model}")
    write_json(json, figures)


def full_prefills(running: Any, prompts: Prompts, repeats: int, batch: int, step: Step) -> list[float]:
    """Milliseconds of full prefills of stock SGLang."""
    flush(running)
    times = []
    for _ in range(repeats + 1):
        times.append(_fresh(running, prompts, batch))
        step()
    return times[1:]  # The first one warms up, here and below.


def fused_prefills(
    running: Any, prompts: Prompts, ratio: float, repeats: int, batch: int, step: Step
) -> list[dict[str, float]]:
    """Milliseconds of fused and full prefills in turn, of the fused ones' parts, and of both with nothing to reuse.

    Raises:
        RuntimeError: fusion did not engage.
    """
    pairs = []
    for i in range(repeats + 1):
        pairs.append(_pair(running, prompts, ratio, batch, swap=bool(i % 2)))
        step()
    return pairs[1:]


def summary(stock: list[float], pairs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians and ratios of what was measured."""
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
    flush(running)
    prompts.renew()
    generate(running, prompts.shuffled(), a3=False)  # The donor: an ordinary request.
    targets = [prompts.shuffled() for _ in range(batch)]
    measured: dict[str, float] = {}
    for fuse in (False, True) if swap else (True, False):
        if not fuse:
            measured["alternating_full_ms"] = _fresh(running, prompts, batch, False)
            continue
        measured["a3_ms"], metas = _timed(running, targets, {"ratio": ratio})
        for report in (meta["a3"] for meta in metas):
            if report["reason"] is not None or not report["reused"] + report["recomputed"]:
                raise RuntimeError(f"fusion did not engage: {report}")
        # Requests of one batch report the same parts; those of several batches come one after the other.
        parts = {tuple(meta["a3_ms"].items()) for meta in metas}
        measured |= {f"{part}_ms": sum(dict(one)[f"{part}_ms"] for one in parts) for part in PARTS}
    for option in (False, None) if swap else (None, False):
        name = "idle_full_ms" if option is False else "idle_a3_ms"
        measured[name] = _fresh(running, prompts, batch, option)
    return measured


def _timed(running: Any, prompts: list[list[int]], a3: Any) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds until all requests have their first token, and what the engine says of each."""
    # The overlap scheduler may still decode a step for the requests before.
    time.sleep(SETTLE_SECONDS)
    started = time.perf_counter()
    metas = [out["meta_info"] for out in generate_all(running, prompts, a3=a3)]
    return (time.perf_counter() - started) * 1e3, metas


def _fresh(running: Any, prompts: Prompts, batch: int, a3: bool | None = None) -> float:
    """Milliseconds of a batch of which nothing is cached."""
    elapsed, metas = _timed(running, [prompts.tokens(prompts.length) for _ in range(batch)], a3)
    # Of a hundred prompts one may well begin with another's first token.
    if any(meta["cached_tokens"] > prompts.length // 100 for meta in metas):
        raise RuntimeError("prompts of fresh tokens were found cached")
    return elapsed


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
