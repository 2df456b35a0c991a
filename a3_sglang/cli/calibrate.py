"""``a3-sglang calibrate``: fit the model of drift to a language model, on the real engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from a3_sglang.cli.common import (
    DtypeOption,
    JsonOption,
    ModelOption,
    VerboseOption,
    console,
    engines,
    print_table,
    write_json,
)
from a3_sglang.cli.experiment import DataOption, experiment
from a3_sglang.cli.output import steps
from a3_sglang.config import DONOR_MODES
from a3_sglang.drift.file import DriftFile, known_file
from a3_sglang.drift.fingerprint import fingerprint
from a3_sglang.drift.fit import Moments, SpanDrift, fit
from a3_sglang.drift.model import DEFAULT, Covariance
from a3_sglang.evaluation.calibration import KINDS, MeasuredSpan, left, measure

TASK = "facts"
"""Synthetic questions without ``--data``; their passages are documentation of Python."""
OFFSETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
DEEP = 64
"""First offset of the rows whose covariance is printed by distance."""


def calibrate(
    model: ModelOption,
    data: DataOption = None,
    limit: Annotated[int, typer.Option(min=2, help="Questions to measure.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; by default where servers of this model look for it."),
    ] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print what was measured, and write no file.")] = False,
    passages: Annotated[int, typer.Option(min=2, help="Passages a question keeps.")] = 5,
    passage_tokens: Annotated[int, typer.Option(min=128, help="Tokens a passage keeps.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed of built-in questions and of the passages' order.")] = 0,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Measure how the KV of reused text differs from what its prompt would compute, and fit the model of drift to it.

    Every prompt runs on the real engine, with harvested and with compiled donors. Servers of this model find the file
    by the model's fingerprint (--a3-drift auto) and then choose and correct rows by it. The last table says what the
    fit is worth: the share of drift that its predictions leave, also on questions that it was not fitted to.
    """
    of = fingerprint(model)
    if of is None and not print_only:
        raise typer.BadParameter(f"the files of {model} are not on this machine", param_hint="--model")
    asked, settings = experiment(model, data, TASK, 0, limit, passages, passage_tokens, seed, dtype)
    found: list[MeasuredSpan] = []
    with steps("measuring", len(asked.numbers)) as step:
        write = partial(asked.writer.case, asked.questions)
        for spans in measure(engines(model), write, asked.numbers, **asked.arguments):
            found += spans
            step()
    try:
        fitted = {kind: fit(_of(found, kind)) for kind in KINDS}
        rows = _worth(found, fitted)
    except ValueError as error:
        more = "measure more questions (--limit) or longer passages (--passage-tokens)"
        raise typer.BadParameter(f"{error}; {more}") from None
    for kind in KINDS:
        _print_measured(kind, found, fitted[kind])
    _print_worth(rows)
    kept = ("questions", "passages", "passage_tokens", "seed", "dtype", "sglang")
    measured = {name: settings[name] for name in kept}
    measured |= {"count": len(asked.numbers), "spans": len(found), "left": rows}
    keys, values = (fitted[kind] for kind in KINDS)
    written = DriftFile(model=model, fingerprint=of or "unknown", keys=keys, values=values, measured=measured)
    write_json(json, written.model_dump())
    if not print_only:
        path = output or known_file(written.fingerprint)
        written.write(path)
        how = f"--a3-drift {path}" if output else "--a3-drift auto, which is the default"
        console.print(f"written to {path}; servers of this model use it with {how}", highlight=False, soft_wrap=True)


def _of(found: list[MeasuredSpan], kind: str) -> list[SpanDrift]:
    spans: list[SpanDrift] = [getattr(span, kind) for span in found]
    return spans


def _worth(found: list[MeasuredSpan], fitted: dict[str, Covariance]) -> list[dict[str, Any]]:
    """Share of drift left by the default, by a fit to the other half of the questions, and by the fit to all."""
    numbers = sorted({span.question for span in found})
    halves = [[span for span in found if numbers.index(span.question) % 2 == half] for half in (0, 1)]
    rows = []
    for kind in KINDS:
        for half, name in enumerate(("even", "odd")):
            tested, other = _of(halves[half], kind), _of(halves[1 - half], kind)
            models = {"default": getattr(DEFAULT, kind), "other_half": fit(other), "all": fitted[kind]}
            row: dict[str, Any] = {"kind": kind, "tested_on": name}
            for source, covariance in models.items():
                row[source] = round(left(tested, covariance), 4)
                row[f"{source}_true"] = round(left(tested, covariance, seed=0), 4)
            rows.append(row)
    return rows


def _print_worth(rows: list[dict[str, Any]]) -> None:
    columns = ("default", "other_half", "all")
    for suffix, title in (("", "as fused prefills show it, damped"), ("_true", "known exactly, of random rows")):
        print_table(
            f"share of drift that is left, predicted from 15% of the rows: their drift {title}",
            ("", "questions", "default", "fit to the other half", "fit to all"),
            [(row["kind"], row["tested_on"], *(f"{row[name + suffix]:.3f}" for name in columns)) for row in rows],
        )


def _print_measured(kind: str, found: list[MeasuredSpan], fitted: Covariance) -> None:
    """Measured and modelled variances and covariances, in units of the variance well inside a span."""
    by_mode = {mode: _of([span for span in found if span.donors == mode], kind) for mode in DONOR_MODES}
    size = max(len(span.drift) for spans in by_mode.values() for span in spans)
    means: dict[str, torch.Tensor] = {mode: _means(spans, size) for mode, spans in by_mode.items()}
    offsets = torch.arange(size)
    for name, covariance in (("fitted", fitted), ("default", getattr(DEFAULT, kind))):
        means[name] = covariance(offsets, offsets) + covariance.nugget(offsets).diag()
    known = [offset for offset in OFFSETS if offset < size]

    def table(title: str, column: str, value: Any, begin: int) -> None:
        rows = [[at, *(f"{value(mean, at):.2f}" for mean in means.values())] for at in known if at >= begin]
        print_table(f"{kind}, {title}", (column, *means), rows)

    table("variance by offset", "offset", lambda mean, at: mean[at, at], 0)
    table("covariance with the first row of the span", "distance", lambda mean, at: mean[0, at], 1)
    table(f"covariance from offset {DEEP} on", "distance", lambda mean, at: mean.diagonal(at)[DEEP:].nanmean(), 1)
    print_table(f"{kind}, fitted", ("", ""), [(name, f"{value:.3g}") for name, value in vars(fitted).items()])


def _means(spans: list[SpanDrift], size: int) -> torch.Tensor:
    """Mean covariance of each pair of rows over the spans, in their unit; NaN if no span has both."""
    total, count = torch.zeros(2, size, size)
    for span in spans:
        rows = len(span.drift)
        total[:rows, :rows] += span.drift
        count[:rows, :rows] += 1
    return total / count / Moments.of(spans).unit
