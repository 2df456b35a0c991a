"""``a3-sglang eval``: how far every selector's answers are from the full prefill's, on the real engine."""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from typing import Annotated

import typer

from a3_sglang.cli.common import (
    DtypeOption,
    JsonOption,
    ModelOption,
    VerboseOption,
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
from a3_sglang.config import AUTO, DONOR_MODES, check_combination, check_ratio, check_selector
from a3_sglang.evaluation.prompts import SHAPES
from a3_sglang.evaluation.runner import IGNORES_RATIO, NOISE, Result, Variant, run, summary


def evaluate(
    model: ModelOption,
    data: DataOption = None,
    task: TaskOption = "facts",
    selectors: Annotated[str, typer.Option(help="Comma-separated rules.")] = "probe,epic,random,reuse",
    ratios: Annotated[
        str, typer.Option(help="Comma-separated shares of reused tokens to recompute, or auto.")
    ] = "0.15",
    charged: Annotated[
        bool, typer.Option("--charged", help="Ratios are charged budgets: every rule costs the same.")
    ] = False,
    answers: Annotated[
        bool, typer.Option(help="Every rule also generates its own answer, for F1 and exact match.")
    ] = True,
    donors: Annotated[str, typer.Option(help="Comma-separated: harvest, compiled.")] = "harvest",
    limit: LimitOption = 24,
    start: StartOption = 0,
    passages: Annotated[int, typer.Option(min=2, help="Passages a question keeps.")] = 5,
    passage_tokens: Annotated[
        int, typer.Option(min=64, help="Tokens a passage keeps; one long text is cut into passages of this length.")
    ] = 400,
    shape: Annotated[
        str, typer.Option(help=f"Shape of the prompts: {'; '.join(f'{k}: {v}' for k, v in SHAPES.items())}.")
    ] = "last",
    seed: Annotated[int, typer.Option(help="Seed of synthetic questions and of the passages' order.")] = 0,
    cells: CellsOption = None,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Mean KL divergence to the full prefill, agreement, F1 and exact match of every selector.

    Every prompt is asked on the real engine: first with fusion off, which is the reference; then other requests leave
    its passages in the cache, and each selector answers. The passages come from one earlier prompt, in another order
    among foreign ones (harvest), or each was prefilled alone after the prompt's own beginning (compiled). For KL and
    agreement the reference's greedy answer is forced, 12 tokens at most. The row `full` recomputes everything, `noise`
    is the reference asked again.
    """
    variants = parse_variants(selectors, ratios, donors)
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}", param_hint="--shape")
    asked, settings = experiment(
        *(model, data, task, start, limit, passages, passage_tokens, seed, dtype),
        shape=shape,
        charged=charged,
        answers=answers,
        drift=drift_of(model),
    )
    done, numbers = Cells(cells, settings, Result), asked.numbers
    before = sum((number, *variant) in done for number in numbers for variant in variants)
    with steps("asking", len(numbers) * len(variants), before) as step:
        for result in run(asked, variants, engines(model), done):
            done.keep(result)
            step()
    rows = [summary(variant, [done[(number, *variant)] for number in numbers]) for variant in variants]
    title = (
        f"a3-sglang eval {model}, {len(numbers)} questions of {data or task}, {passages} passages of {passage_tokens} "
        f"tokens, {SHAPES[shape]}"
    )
    columns = ["selector", "ratio", "donors", "kl", "agreement", *(("f1", "em") if answers else ()), "charged", "n"]
    print_table(title, columns, [[row[name] for name in columns] for row in rows])
    write_json(json, {"rows": rows, "data": str(data or task), "model": model, "device": device_name(), **settings})


def parse_variants(selectors: str, ratios: str, donors: str) -> list[Variant]:
    """All combinations ``(selector, ratio, donors)``, with the reference rows first in every donor mode.

    Rules that do not support the ratio ``auto`` are left out for it.

    Raises:
        typer.BadParameter: names the option and what it accepts.
    """
    try:
        names = [check_selector(name.strip()) for name in selectors.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--selectors") from None
    try:
        shares = [check_ratio(AUTO if ratio.strip() == AUTO else float(ratio)) for ratio in ratios.split(",")]
    except ValueError:
        message = f'must be comma-separated numbers from 0 to 1, or "{AUTO}", not {ratios!r}'
        raise typer.BadParameter(message, param_hint="--ratios") from None
    modes = [mode.strip() for mode in donors.split(",")]
    if unknown := set(modes) - set(DONOR_MODES):
        message = f"unknown donor mode {sorted(unknown)[0]!r}; choose from {', '.join(DONOR_MODES)}"
        raise typer.BadParameter(message, param_hint="--donors")
    variants: list[Variant] = []
    for mode in modes:
        variants += [(NOISE, 0.0, mode), ("full", 1.0, mode)]
        for name, share in product(names, shares):
            with suppress(ValueError):
                share = IGNORES_RATIO.get(name, share)
                variants.append((name if name in IGNORES_RATIO else check_combination(name, share), share, mode))
    return list(dict.fromkeys(variants))
