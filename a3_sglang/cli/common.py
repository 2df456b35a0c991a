"""What the subcommands share: options, engines with progress on the screen, tables, JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from a3_sglang.cli.output import VERBOSE, working
from a3_sglang.client import StartEngine, engine
from a3_sglang.cpu import serving_dtype

console = Console()

ModelOption = Annotated[str, typer.Option(help="Model folder or Hub id.")]
DtypeOption = Annotated[
    str, typer.Option(help="Dtype of the model, by SGLang's name; auto: on a CPU, the one that is fast on it.")
]
VerboseOption = Annotated[bool, typer.Option(VERBOSE, help="Show what SGLang and its libraries print.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]


def resolve_dtype(dtype: str) -> str:
    """The dtype that a command serves its model in; printed with the reason."""
    import torch

    reason = "given with --dtype"
    if dtype == "auto":
        dtype, reason = ("auto", "the model's own") if torch.cuda.is_available() else serving_dtype()
    console.print(f"dtype {dtype}: {reason}", highlight=False)
    return dtype


def device_name() -> str:
    """What the engines run on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def check_chunks(context: int, chunks: int) -> None:
    """Refuse chunks of fewer than 64 tokens, which may be too short to be reused.

    Raises:
        typer.BadParameter: they are too short.
    """
    if context < 64 * chunks:
        wanted = f"a chunk needs at least 64 tokens: --context {64 * chunks} or more, or fewer chunks"
        raise typer.BadParameter(wanted, param_hint="--chunks")


def engines(model: str) -> StartEngine:
    """Start engines of a model with progress on the screen: call the result as ``start(backend, **arguments)``."""
    level = "warning" if VERBOSE in sys.argv else "error"
    return partial(engine, model, progress=working, log_level=level)


def write_json(path: Path | None, figures: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    shown = any(columns)
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=shown)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)
