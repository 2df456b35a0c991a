"""``a3-sglang bench``: what the fused prefill gains, against stock SGLang in the same run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.progress import Progress

from a3_sglang.cli.common import (
    JsonOption,
    ModelOption,
    Prompts,
    console,
    engine,
    environment,
    generate,
    print_table,
    progress_console,
    vocabulary_of,
    write_json,
)

SETTLE_SECONDS = 0.3

app = typer.Typer(no_args_is_help=True, help="Measure time to first token.")


@app.callback()
def _group() -> None:
    """Keep ``ttft`` a subcommand of its own."""


@app.command()
def ttft(
    model: ModelOption,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a prompt before its question.")] = 4096,
    chunks: Annotated[int, typer.Option(min=2, help="Chunks of a prompt.")] = 8,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of reused tokens to recompute.")] = 0.15,
    repeats: Annotated[int, typer.Option(min=1, help="Measured pairs.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json: JsonOption = None,
) -> None:
    """Time to first token of shuffled chunks: stock SGLang's full prefill against a3.

    One engine at a time, as two would take each other's cores: first stock SGLang, then a3, where fused and full
    prefills (the request turns fusion off) alternate. Prefill is not chunked in either, which is stock's best
    setting. The speed-up is against the faster of the two full prefills. Fails if fusion does not engage.
    """
    import sglang

    prompts = Prompts(vocabulary_of(model), context, chunks, seed)
    pairs: list[dict[str, float]] = []
    idle: list[dict[str, float]] = []
    stock: list[float] = []
    with engine(model, None, chunked_prefill_size=2 * context) as running, _steps("stock", repeats) as step:
        for i in range(repeats + 1):
            elapsed = _fresh(running, prompts.tokens(len(prompts.shuffled())))
            if i:  # The first one warms up, here and below.
                stock.append(elapsed)
            step()
    with (
        environment(A3_TIMINGS="1"),
        engine(model, "a3", chunked_prefill_size=2 * context) as running,
        _steps("a3", repeats) as step,
    ):
        for i in range(repeats + 1):
            pair, nothing = _pair(running, prompts, ratio, swap=bool(i % 2), measure_idle=i > 0)
            if i:
                pairs.append(pair)
                idle.append(nothing)
            step()
    median = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
    figures: dict[str, Any] = {key: round(value, 3) for key, value in median.items()}
    figures["stock_ms"] = round(statistics.median(stock), 3)
    figures["full_ms"] = round(min(statistics.median(stock), median["full_ms"]), 3)
    figures["alternating_full_ms"] = round(median["full_ms"], 3)
    figures["speedup"] = round(figures["full_ms"] / median["a3_ms"], 3)
    figures["selection_share"] = round((median["probe_ms"] + median["select_ms"]) / median["a3_ms"], 4)
    figures["repeats_full_ms"], figures["repeats_a3_ms"] = stock, [pair["a3_ms"] for pair in pairs]
    figures["nothing_to_reuse"] = round(
        statistics.median(n["a3_ms"] for n in idle) / statistics.median(n["full_ms"] for n in idle), 4
    )
    figures |= {
        "context": context,
        "chunks": chunks,
        "ratio": ratio,
        "repeats": repeats,
        "device": _device(),
        "sglang": sglang.__version__,
    }
    parts = [(name, f"{median[name + '_ms']:.1f} ms") for name in ("copy", "probe", "select", "recompute", "tail")]
    print_table(
        f"time to first token, {context} tokens in {chunks} chunks, ratio {ratio}, medians of {repeats}",
        ("", ""),
        [
            ("full prefill", f"{figures['full_ms']:.0f} ms"),
            ("a3", f"{median['a3_ms']:.0f} ms"),
            *(("  " + name, value) for name, value in parts),
            ("  of it selection (probe and select)", f"{figures['selection_share']:.1%}"),
            ("speed-up", f"{figures['speedup']:.2f}x"),
            ("nothing to reuse, a3 / stock", f"{figures['nothing_to_reuse']:.3f}"),
        ],
    )
    console.print(f"{figures['device']}, SGLang {sglang.__version__}, {model}")
    write_json(json, figures)


@contextmanager
def _steps(name: str, repeats: int) -> Iterator[Callable[[], None]]:
    """Progress that is drawn between measurements only: drawing takes time from a CPU engine."""
    with Progress(console=progress_console, auto_refresh=False) as progress:
        task = progress.add_task(f"measuring {name}", total=repeats + 1)
        progress.refresh()

        def step() -> None:
            progress.advance(task)
            progress.refresh()

        yield step


def _pair(
    running: Any, prompts: Prompts, ratio: float, swap: bool, measure_idle: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """One full prefill and one fused prefill of equally long prompts; then both with nothing to reuse."""
    running.flush_cache()
    prompts.renew()
    generate(running, prompts.shuffled(), a3=False)  # The donor: an ordinary request.
    target = prompts.shuffled()

    def fresh(a3: bool | None) -> float:
        return _fresh(running, prompts.tokens(len(target)), a3)

    if swap:
        full_ms = fresh(False)
        a3_ms, meta = _timed(running, target, {"ratio": ratio})
    else:
        a3_ms, meta = _timed(running, target, {"ratio": ratio})
        full_ms = fresh(False)
    report = meta["a3"]
    if report["reason"] is not None or not report["reused"] + report["recomputed"]:
        raise RuntimeError(f"fusion did not engage: {report}")
    idle: dict[str, float] = {}
    if measure_idle:
        for option in (False, None) if swap else (None, False):
            idle["full_ms" if option is False else "a3_ms"] = fresh(option)
    return {"full_ms": full_ms, "a3_ms": a3_ms, **meta["a3_ms"]}, idle


def _timed(running: Any, ids: list[int], a3: Any) -> tuple[float, dict[str, Any]]:
    """Milliseconds of a request, and what the engine says of it."""
    # The overlap scheduler may still decode a step for the request before.
    time.sleep(SETTLE_SECONDS)
    started = time.perf_counter()
    meta = generate(running, ids, a3=a3)["meta_info"]
    return (time.perf_counter() - started) * 1e3, meta


def _fresh(running: Any, ids: list[int], a3: bool | None = None) -> float:
    """Milliseconds of a request of which nothing is cached."""
    elapsed, meta = _timed(running, ids, a3)
    if meta["cached_tokens"]:
        raise RuntimeError(f"a prompt of fresh tokens found {meta['cached_tokens']} of them cached")
    return elapsed


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
