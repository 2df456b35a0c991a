"""``a3-sglang warm``: prefill documents on a running server before the first question comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from a3_sglang.cli.common import JsonOption, VerboseOption, console, print_table, write_json
from a3_sglang.cli.output import steps
from a3_sglang.warm import Document, ServerError, ServerInfo, Warmed, server_info, warm
from a3_sglang.warm.journal import Journal
from a3_sglang.warm.sources import Wrong, count, files, read

FULL = 0.9
"""Share of the KV pool that documents may fill; prompts and answers need room, too."""
LINE_SECONDS = 2.0
"""Between lines of progress that go elsewhere than to a terminal."""


class Run:
    """Warms documents and counts.

    Args:
        send: :func:`a3_sglang.warm.warm` for one server and one beginning of prompts.
        info: of the server.
        journal: of what it holds.
        evict: whether to go on when the KV pool is full.

    Raises:
        ServerError: the server cannot be warmed.
    """

    def __init__(self, send: Callable[..., Iterator[Warmed]], info: ServerInfo, journal: Journal, evict: bool) -> None:
        self.send, self.info, self.journal, self.evict = send, info, journal, evict
        self.warmed = self.skipped = self.computed = self.tokens = 0
        self.failed: list[Wrong] = []
        self.full = self.left_out = False
        self.failure: str | None = None
        self._seen: set[str] = set()
        self._checked = not len(journal)
        """Whether the server still holds what the journal says."""
        template = next(send([Document("-")]))
        if template.error is not None:
            raise ServerError(template.error)
        self._template = template.tokens
        """Tokens of a request beside those of its document."""

    @property
    def kv_bytes(self) -> int | None:
        """Of the documents' KV; None if the server does not say how large KV is."""
        return None if self.info.token_bytes is None else round(self.tokens * self.info.token_bytes)

    @property
    def complete(self) -> bool:
        """Whether the server now holds every document of the sources."""
        return not self.failed and not self.left_out and self.failure is None

    def run(self, paths: list[Path], concurrency: int, rate: float | None) -> None:
        with steps("warming", count(paths), pause=LINE_SECONDS) as step:

            def missing() -> Iterator[Document]:
                for one in read(paths):
                    if self.full and not self.evict:
                        self.left_out = True
                        return
                    if isinstance(one, Wrong):
                        self._fail(one)
                    elif not self._holds(one):
                        yield one
                        continue
                    step()

            try:
                for one in self.send(missing(), concurrency=concurrency, rate=rate):
                    self._take(one)
                    step()
            except ServerError as error:
                self.failure = str(error)

    def _holds(self, document: Document) -> bool:
        """Whether a document need not be sent; the first one of an earlier run is sent to see if it is still there."""
        key = self.journal.key(document)
        if key in self._seen:
            self.skipped += 1
            return True
        self._seen.add(key)
        known = self.journal.tokens(document)
        if known is None:
            return False
        if not self._checked:
            self._checked = True
            again = next(self.send([document]))
            lost = again.error is None and 2 * (again.cached - self._template) < again.tokens - self._template
            if lost:
                console.print("the server's cache was emptied since the last run; every document is warmed anew")
                self.journal.forget()
            if lost or again.error is not None:
                self._take(again)
                return True
        self.skipped += 1
        self._count(known)
        return True

    def _take(self, one: Warmed) -> None:
        if one.error is not None:
            self._fail(Wrong(one.document.name, one.error))
            return
        # What was cached of a new document is the template, which all share; of an old one it is nearly everything.
        tokens = one.tokens - min(one.cached, self._template)
        self.journal.add(one.document, tokens)
        self.warmed += 1
        self.computed += one.tokens - one.cached
        self._count(tokens)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self.full or self.info.slots is None or self.tokens < FULL * self.info.slots:
            return
        self.full = True
        console.print(
            f"the documents fill {self.tokens / self.info.slots:.0%} of the KV pool ({self.info.slots} tokens): "
            + ("from here on they may evict earlier ones" if self.evict else "stopping; --evict goes on"),
            highlight=False,
        )

    def _fail(self, wrong: Wrong) -> None:
        self.failed.append(wrong)
        console.print(f"{wrong.place} skipped: {wrong.reason}", markup=False, highlight=False)


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
    system: Annotated[str | None, typer.Option(help="System message of the prompts to come.")] = None,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Documents per second, at most.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Documents that are sent at once.")] = 1,
    resume: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Keep here what was warmed, and skip it in the next run.")
    ] = None,
    evict: Annotated[bool, typer.Option("--evict", help="Go on when the KV pool is full.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="SGLANG_API_KEY", help="Of the server.")] = None,
    cache_salt: Annotated[str | None, typer.Option(help="Namespace of the prompts to come.")] = None,
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Prefill documents on a running server, so that the first question over them finds their KV.

    Every document is sent alone, as a donor. Lines and files that are no documents are named and skipped. Exits with
    1 if anything was skipped for that reason, failed, or was left out because the KV pool is full.
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
        run = Run(send, info, journal, evict)
    except ServerError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    run.run(paths, concurrency, rate)
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
