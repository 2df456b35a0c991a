"""``a3-sglang warm``: prefill documents on a running server before the first question about them."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from a3_sglang.cli.common import JsonOption, VerboseOption, console, print_table, write_json
from a3_sglang.cli.output import steps
from a3_sglang.warm import ServerError, server_info, warm
from a3_sglang.warm.journal import Journal
from a3_sglang.warm.run import Run
from a3_sglang.warm.sources import count, files

LINE_SECONDS = 2.0
"""Between lines of progress, if it is not shown in a terminal."""


def warm_documents(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            allow_dash=True,
            help='JSON Lines with a document each ("text", and "name", "title" or "id"), text or Markdown files, '
            "folders of these, or - for JSON Lines on standard input.",
        ),
    ],
    url: Annotated[str, typer.Option(help="Of the server, for example http://127.0.0.1:30000.")],
    system: Annotated[str | None, typer.Option(help="System message of the later prompts.")] = None,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Documents per second, at most.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Documents that are sent at once.")] = 1,
    resume: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Record in this file what was warmed, and skip it in the next run."),
    ] = None,
    evict: Annotated[bool, typer.Option("--evict", help="Continue when the KV pool is full.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="SGLANG_API_KEY", help="Of the server.")] = None,
    cache_salt: Annotated[str | None, typer.Option(help="Namespace of the later prompts.")] = None,
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Prefill documents on a running server, so that the first question about them finds their KV.

    Every document is sent alone, as a donor. Lines and files that are not documents are named and skipped. The exit
    status is 1 if anything was skipped for that reason, failed, or was left out because the KV pool is full.
    """
    started = time.monotonic()
    try:
        paths = files(sources)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="SOURCE") from None
    try:
        info = server_info(url, api_key)
        try:
            journal = Journal(resume, info.start, (system, cache_salt))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--resume") from None
        send = partial(warm, url, system=system, api_key=api_key, cache_salt=cache_salt)
        run = Run(send, info, journal, evict, partial(console.print, markup=False, highlight=False))
    except ServerError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    with steps("warming", count(paths), pause=LINE_SECONDS) as step:
        run.run(paths, concurrency, rate, step)
    seconds = time.monotonic() - started
    _print(run, seconds)
    write_json(json, _figures(run, seconds))
    if run.failure is not None:
        again = "run it again" if resume is None else "run it again: what was warmed is skipped"
        typer.echo(f"error: {run.failure}; {again}", err=True)
    if not run.complete:
        raise typer.Exit(1)


def _print(run: Run, seconds: float) -> None:
    size = run.kv_bytes
    rows = [
        ("documents warmed", f"{run.warmed:,}"),
        ("known and skipped", f"{run.skipped:,}"),
        ("wrong or failed", f"{len(run.failed):,}"),
        ("tokens of documents", f"{run.tokens:,}"),
        ("KV of documents", "unknown" if size is None else f"about {size / 2**20:,.1f} MiB"),
        ("share of the KV pool", f"{run.tokens / run.info.slots:.1%}" if run.info.slots else "unknown"),
        ("tokens computed", f"{run.computed:,}"),
        ("time", f"{seconds:.1f} s"),
    ]
    print_table("", ("", ""), rows)


def _figures(run: Run, seconds: float) -> dict[str, Any]:
    return {
        "warmed": run.warmed,
        "skipped": run.skipped,
        "failed": [{"place": one.place, "reason": one.reason} for one in run.failed],
        "tokens": run.tokens,
        "kv_bytes": run.kv_bytes,
        "slots": run.info.slots,
        "computed": run.computed,
        "full": run.full,
        "left_out": run.left_out,
        "error": run.failure,
        "seconds": round(seconds, 3),
    }
