"""``a3-sglang bench equal``: time to first token of the default and of published rules at equal quality."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from a3_sglang.cli.common import (
    DtypeOption,
    JsonOption,
    ModelOption,
    VerboseOption,
    check_chunks,
    console,
    device_name,
    engines,
    print_table,
    write_json,
)
from a3_sglang.cli.experiment import (
    Cells,
    CellsOption,
    DataOption,
    LimitOption,
    StartOption,
    TaskOption,
    drift_of,
    experiment,
)
from a3_sglang.cli.output import steps
from a3_sglang.client import Prompts, StartEngine, environment, vocabulary_of
from a3_sglang.config import DONOR_MODES
from a3_sglang.evaluation.equal import DEFAULT, GRID, PEERS, RATIO, draw, ratios_for
from a3_sglang.evaluation.runner import Evaluation, Experiment, Result, Variant, evaluating, summary
from a3_sglang.evaluation.ttft import compared_prefills, full_prefills

Rule = tuple[str, float]
"""A selector and a ratio."""


def equal(
    model: ModelOption,
    data: DataOption = None,
    task: TaskOption = "facts",
    limit: LimitOption = 24,
    start: StartOption = 0,
    context: Annotated[int, typer.Option(min=512, help="Tokens of a prompt before its question.")] = 4096,
    chunks: Annotated[int, typer.Option(min=2, help="Passages of a prompt.")] = 8,
    donors: Annotated[str, typer.Option(help=f"Where reused KV comes from: {' or '.join(DONOR_MODES)}.")] = "harvest",
    grid: Annotated[
        str, typer.Option(help=f"Ratios at which the default rule is measured first, besides {RATIO}.")
    ] = ",".join(map(str, GRID)),
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    cells: CellsOption = None,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the figures into this file.")] = None,
) -> None:
    """How much sooner the default rule answers than published ones if it is as close to the full prefill as they are.

    First the mean KL divergence to the full prefill (as in `a3-sglang eval`): of the published rules at a ratio of
    15%, and of the default rule at 15% and at a grid of other ratios. Then that of the default at the ratios at which,
    by interpolation, it is as low as each published rule's; a ratio counts only if the KL measured at it is as low,
    too. Then the time to first token of all of these in turns, and of stock SGLang, on prompts of as many random
    tokens (as in `a3-sglang bench ttft`). The factor is against the faster of stock's full prefill and a3's.
    """
    if donors not in DONOR_MODES:
        raise typer.BadParameter(f"choose from {', '.join(DONOR_MODES)}", param_hint="--donors")
    try:
        ratios = sorted({RATIO, *map(float, grid.split(","))})
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise typer.BadParameter("must be comma-separated numbers above 0 and at most 1", param_hint="--grid")
    check_chunks(context, chunks)
    if svg is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("drawing needs matplotlib: pip install matplotlib", param_hint="--svg")
    asked, settings = experiment(
        model, data, task, start, limit, chunks, context // chunks, seed, dtype, drift=drift_of(model)
    )
    begin = engines(model)
    quality, matched = _quality(asked, donors, ratios, begin, Cells(cells, settings, Result))
    default_ratios = sorted({RATIO, *filter(None, matched.values())})
    rules = [*((peer, RATIO) for peer in PEERS), *((DEFAULT, ratio) for ratio in default_ratios)]
    prompts = Prompts(vocabulary_of(model), context, chunks, seed)
    stock_ms, times = _times(rules, prompts, repeats, begin, settings["dtype"])

    def row(*rule: Any) -> dict[str, Any]:
        measured, ms = quality[rule], statistics.median(times[rule])
        return {
            "rule": rule[0],
            "ratio": rule[1],
            "kl": measured["kl"],
            "charged": measured["charged"],
            "ms": round(ms, 3),
            "speedup": round(stock_ms / ms, 3),
            "repeats_ms": times[rule],
        }

    rows = [row(peer, RATIO) | {"default": row(DEFAULT, ratio) if ratio else None} for peer, ratio in matched.items()]
    default = row(DEFAULT, RATIO)
    title = (
        f"speed at equal quality, {context} tokens, {len(asked.numbers)} questions of {data or task}, {donors} donors"
    )
    _print(title, rows, default, stock_ms)
    console.print(f"{device_name()}, SGLang {settings['sglang']}, {model}")
    if svg is not None:
        draw(rows, default, stock_ms, f"{context} tokens, {device_name()}, {settings['dtype']}", svg)
    curve = [{"ratio": ratio, **quality[DEFAULT, ratio]} for rule, ratio in sorted(quality) if rule == DEFAULT]
    figures = {"rows": rows, "default": default, "stock_ms": round(stock_ms, 3), "curve": curve}
    asked_for = {"data": str(data or task), "model": model, "context": context, "donors": donors, "repeats": repeats}
    write_json(json, figures | asked_for | {"n": len(asked.numbers), "device": device_name()} | settings)


def _quality(
    asked: Experiment, donors: str, ratios: Sequence[float], start: StartEngine, done: Cells[Result]
) -> tuple[dict[Rule, dict[str, Any]], dict[str, float | None]]:
    """Mean figures of each rule that was measured; and for each published rule, the default's ratio at the same KL.

    An engine is started only if a result is missing.
    """
    found: dict[Rule, dict[str, Any]] = {}
    with ExitStack() as stack:

        @cache
        def evaluation() -> Evaluation:
            return stack.enter_context(evaluating(asked, donors, start))

        def measure(rules: Iterable[Rule]) -> None:
            variants: list[Variant] = [(*rule, donors) for rule in rules]
            keys = [(number, *variant) for number in asked.numbers for variant in variants]
            before = sum(key in done for key in keys)
            if before < len(keys):
                with steps("asking", len(keys), before) as step:
                    for result in evaluation().ask(variants, done):
                        done.keep(result)
                        step()
            for variant in variants:
                mean = summary(variant, [done[(number, *variant)] for number in asked.numbers])
                found[variant[0], float(variant[1])] = {key: mean[key] for key in ("kl", "charged", "agreement")}

        def default_at(more: Sequence[float]) -> dict[float, float]:
            measure((DEFAULT, ratio) for ratio in more)
            return {ratio: found[DEFAULT, ratio]["kl"] for ratio in more}

        # In one go, as a question's full prefill and its donors are computed once per call.
        measure([*((peer, RATIO) for peer in PEERS), *((DEFAULT, ratio) for ratio in ratios)])
        matched = ratios_for({peer: found[peer, RATIO]["kl"] for peer in PEERS}, default_at(ratios), default_at)
    return found, matched


def _times(
    rules: Sequence[Rule], prompts: Prompts, repeats: int, start: StartEngine, dtype: str
) -> tuple[float, dict[Rule, list[float]]]:
    """Milliseconds of the faster full prefill, and of each rule's repeats."""
    room = {"chunked_prefill_size": 2 * prompts.length, "dtype": dtype}
    with start(None, **room) as running, steps("measuring stock", repeats + 1) as step:
        stock = full_prefills(running, prompts, repeats, 1, step)
    options: list[Any] = [{"selector": selector, "ratio": ratio} for selector, ratio in rules]
    with (
        environment(A3_REPORT="exact"),
        start("a3", **room) as running,
        steps("measuring a3", repeats + 1) as step,
    ):
        *fused, full = compared_prefills(running, prompts, [*options, False], repeats, 1, step)
    return min(statistics.median(stock), statistics.median(full)), dict(zip(rules, fused, strict=True))


def _print(title: str, rows: Sequence[dict[str, Any]], default: dict[str, Any], stock_ms: float) -> None:
    def line(name: str, row: dict[str, Any]) -> tuple[str, ...]:
        figures = f"{row['ratio']:.4g}", f"{row['kl']:.4f}", f"{row['charged']:.3f}", f"{row['ms']:.0f} ms"
        return name, *figures, f"{row['speedup']:.2f}x"

    lines: list[tuple[str, ...]] = [
        ("full prefill", "", "0", "1", f"{stock_ms:.0f} ms", "1.00x"),
        line(DEFAULT, default),
    ]
    for row in rows:
        lines.append(line(row["rule"], row))
        if row["default"]:
            lines.append(line(f"  {DEFAULT}", row["default"]))
        else:
            lines.append((f"  {DEFAULT}", "never", "", "", "", ""))
    print_table(title, ("rule", "ratio", "KL", "charged", "first token", "speed-up"), lines)
