"""``a3-sglang eval``: how far every selector's answers are from the full prefill's, on the real engine."""

from __future__ import annotations

import hashlib
import json as json_module
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from a3_sglang.cli.common import (
    DtypeOption,
    JsonOption,
    ModelOption,
    VerboseOption,
    engines,
    print_table,
    resolve_dtype,
    write_json,
)
from a3_sglang.cli.output import steps
from a3_sglang.config import AUTO, DONOR_MODES, check_combination, check_ratio, check_selector
from a3_sglang.evaluation.prompts import SHAPES, Writer
from a3_sglang.evaluation.questions import TASKS, load, make
from a3_sglang.evaluation.runner import IGNORES_RATIO, NOISE, Experiment, Result, Variant, run, summary
from a3_sglang.integration.engine import sglang_version


def evaluate(
    model: ModelOption,
    data: Annotated[Path | None, typer.Option(help="JSON file of questions with passages and answers.")] = None,
    task: Annotated[str, typer.Option(help=f"Synthetic questions, without --data: {', '.join(TASKS)}.")] = "facts",
    selectors: Annotated[str, typer.Option(help="Comma-separated rules.")] = "probe,epic,random,reuse",
    ratios: Annotated[
        str, typer.Option(help="Comma-separated shares of reused tokens to recompute, or auto.")
    ] = "0.15",
    charged: Annotated[
        bool, typer.Option("--charged", help="Ratios are charged budgets: every rule costs the same.")
    ] = False,
    donors: Annotated[str, typer.Option(help="Comma-separated: harvest, compiled.")] = "harvest",
    limit: Annotated[int, typer.Option(min=1, help="Questions to ask.")] = 24,
    start: Annotated[int, typer.Option(min=0, help="Questions to skip.")] = 0,
    passages: Annotated[int, typer.Option(min=2, help="Passages a question keeps.")] = 5,
    passage_tokens: Annotated[int, typer.Option(min=64, help="Tokens a passage keeps.")] = 400,
    shape: Annotated[
        str, typer.Option(help=f"Shape of the prompts: {'; '.join(f'{k}: {v}' for k, v in SHAPES.items())}.")
    ] = "last",
    seed: Annotated[int, typer.Option(help="Seed of synthetic questions and of the passages' order.")] = 0,
    cells: Annotated[Path | None, typer.Option(help="Keep single results in this file and resume from it.")] = None,
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
    from transformers import AutoConfig, AutoTokenizer

    variants = parse_variants(selectors, ratios, donors)
    if task not in TASKS:
        raise typer.BadParameter(f"unknown task {task!r}; choose one of {', '.join(TASKS)}", param_hint="--task")
    try:
        # One more than is asked: each question takes foreign passages from the next.
        questions = load(data) if data else make(task, start + limit + 1, passages, passage_tokens // 25, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(model)
    depth = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}", param_hint="--shape")
    writer = Writer(tokenizer, passages, passage_tokens, seed, shape)
    numbers = range(start, min(start + limit, len(questions) - (data is None)))
    if not numbers:
        raise typer.BadParameter(f"there are only {len(questions)} questions", param_hint="--start")
    count = len(numbers)
    source = hashlib.sha256(data.read_bytes()).hexdigest()[:16] if data else task
    served = resolve_dtype(dtype)
    settings = {
        "model_path": model,
        "questions": source,
        "passages": passages,
        "passage_tokens": passage_tokens,
        "seed": seed,
        "charged": charged,
        "shape": shape,
        "sglang": sglang_version(),
        "dtype": served,
    }
    done = {result.key: result for result in _read_results(cells, settings)}
    prefill = 4 * (passages + 2) * (passage_tokens + 32)
    arguments = {"disable_overlap_schedule": True, "chunked_prefill_size": prefill, "dtype": served}
    experiment = Experiment(questions, numbers, variants, writer, tokenizer, depth, charged, arguments)
    before = sum((number, *variant) in done for number in numbers for variant in variants)
    with steps("asking", count * len(variants), before) as step:
        for result in run(experiment, engines(model), done):
            done[result.key] = result
            _append_result(cells, settings, result)
            step()
    rows = [summary(variant, [done[(number, *variant)] for number in numbers]) for variant in variants]
    title = (
        f"a3-sglang eval {model}, {count} questions of {data or task}, {passages} passages of {passage_tokens} tokens, "
        + SHAPES[shape]
    )
    columns = ("selector", "ratio", "donors", "kl", "agreement", "f1", "em", "charged", "n")
    print_table(title, columns, [[row[name] for name in columns] for row in rows])
    write_json(json, {"rows": rows, "data": str(data or task), "model": model, **settings})


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
        message = f'numbers between 0 and 1 or "{AUTO}", with commas, not {ratios!r}'
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


def _read_results(path: Path | None, settings: dict[str, Any]) -> Iterator[Result]:
    """Single results of an interrupted run."""
    if path is None or not path.exists():
        return
    for line in path.read_text().splitlines():
        kept = json_module.loads(line)
        if kept.pop("settings") != settings:
            raise typer.BadParameter(f"{path} holds results of other settings; name another file", param_hint="--cells")
        yield Result(**kept)


def _append_result(path: Path | None, settings: dict[str, Any], result: Result) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json_module.dumps({"settings": settings} | asdict(result)) + "\n")
