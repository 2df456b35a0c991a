"""``a3-sglang bench workloads``: loads like those of real users, on stock SGLang and on a3 in one run."""

from __future__ import annotations

from typing import Annotated

import typer

from a3_sglang.cli.common import (
    DtypeOption,
    JsonOption,
    ModelOption,
    VerboseOption,
    console,
    device_name,
    engines,
    print_table,
    resolve_dtype,
    write_json,
)
from a3_sglang.cli.output import steps
from a3_sglang.client import environment, vocabulary_of
from a3_sglang.evaluation.workloads import CHUNK, LOADS, Sample, compare, measure
from a3_sglang.integration.engine import sglang_version

CLOSE = 0.8
"""A load whose ratio is at least this is measured on stock again after a3, as a machine's speed may drift that much."""


def workloads(
    model: ModelOption,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a prompt's passages.")] = 2048,
    loads: Annotated[str, typer.Option(help=f"Which, separated by commas: {', '.join(LOADS)}.")] = ",".join(LOADS),
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Time to first token of loads like those of real users, a3 against stock SGLang with its prefix cache.

    Both engines get the same prompts and compute at most 512 rows per prefill step. A row of several requests is
    their median. If the two are close, stock is measured before and after a3.
    """
    chosen = [name.strip() for name in loads.split(",")]
    if unknown := [name for name in chosen if name not in LOADS]:
        raise typer.BadParameter(f"unknown load {unknown[0]!r}; choose from {', '.join(LOADS)}", param_hint="--loads")
    start, vocabulary = engines(model), vocabulary_of(model)
    room = {"chunked_prefill_size": CHUNK, "dtype": resolve_dtype(dtype)}

    def measured(backend: str | None, loads: list[str]) -> dict[str, list[Sample]]:
        with (
            environment(A3_REPORT="exact"),
            start(backend, **room) as running,
            steps(f"measuring {backend or 'stock'}", len(loads) + 1) as step,
        ):
            return dict(measure(running, loads, vocabulary, context, seed, step))

    stock, a3 = measured(None, chosen), measured("a3", chosen)
    close = [name for name in chosen if any(row["ratio"] >= CLOSE for row in compare(a3[name], stock[name]))]
    if close:
        for name, samples in measured(None, close).items():
            stock[name] += samples
    rows = [row for name in chosen for row in compare(a3[name], stock[name])]
    print_table(
        f"time to first token, {context} tokens of passages, SGLang {sglang_version()}, medians",
        ("load", "a3", "stock", "a3 / stock", "reused"),
        [
            (
                row["load"],
                f"{row['a3_ms']:.0f} ms",
                f"{row['stock_ms']:.0f} ms",
                f"{row['ratio']:.2f}",
                f"{row['reused_share']:.0%}",
            )
            for row in rows
        ],
    )
    console.print(model)
    figures = {"rows": rows, "model": model, "context": context, "chunk": CHUNK, "seed": seed}
    write_json(json, figures | {"device": device_name(), "dtype": room["dtype"], "sglang": sglang_version()})
