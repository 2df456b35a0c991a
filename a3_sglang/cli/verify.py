"""``a3-sglang verify``: the invariants of ``docs/architecture.md`` on a live engine of a given model."""

from __future__ import annotations

from typing import Annotated

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
from a3_sglang.cli.output import working
from a3_sglang.client import Prompts, vocabulary_of
from a3_sglang.evaluation import verification


def verify(
    model: ModelOption,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the ratio-1.0 check.")] = 20,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a prompt before its question.")] = 640,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Check the invariants on a live engine of this model. The exit status is 0 only if all hold."""
    source = Prompts(vocabulary_of(model), context, 4, seed)
    served = resolve_dtype(dtype)
    checks = list(
        verification.verify(engines(model), source, prompts, working, chunked_prefill_size=4 * context, dtype=served)
    )
    rows = [(check.name, "holds" if check.ok else "BROKEN", check.measured) for check in checks]
    print_table(f"a3-sglang verify {model}", ("invariant", "", "measured"), rows)
    write_json(json, [{"check": check.name, "ok": check.ok, "measured": check.measured} for check in checks])
    if not all(check.ok for check in checks):
        raise typer.Exit(1)
