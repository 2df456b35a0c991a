"""``a3-sglang analyze``: how much of a log's prompts repeats, and what a3 would compute of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from a3_sglang.cli.common import JsonOption, VerboseOption, console, print_table, write_json
from a3_sglang.config import ServerOptions
from a3_sglang.reporting.report import PARTS

if TYPE_CHECKING:
    from a3_sglang.evaluation.analysis import Analysis, Document, Sums

TOP = 10


def analyze_log(
    log: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="Requests: JSON Lines of OpenAI's or SGLang's API, SGLang's request dump (.pkl, only your own), or "
            "plain text with one prompt per line.",
        ),
    ],
    model: Annotated[str, typer.Option(help="Model folder or Hub id, for its tokenizer and chat template.")],
    slots: Annotated[int, typer.Option(min=1024, help="Size of the KV pool in tokens.")] = 200_000,
    chunk: Annotated[int, typer.Option(min=256, help="SGLang's --chunked-prefill-size.")] = 8192,
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """How much of a log's prompts repeats, as a prefix and at any position, and what a3 would compute of them.

    Needs no engine and no GPU: the requests are replayed one after the other on SGLang's own tree, without KV. The
    server's options are read from the environment (A3_RECOMPUTE_RATIO=0.2).
    """
    from transformers import AutoTokenizer

    # Imported here because it imports SGLang, which takes seconds and which other commands can do without.
    from a3_sglang.evaluation.analysis import LoggedRequest, Skipped, analyze, read
    from a3_sglang.integration.startup import line_ends

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = list(read(log, tokenizer))
    requests = [one for one in found if isinstance(one, LoggedRequest)]
    skipped = [one for one in found if isinstance(one, Skipped)]
    for one in skipped[:TOP]:
        console.print(f"line {one.line} skipped: {one.reason}", markup=False)
    if len(skipped) > TOP:
        console.print(f"and {len(skipped) - TOP} more lines")
    if not requests:
        raise typer.BadParameter("no line is a request", param_hint="LOG")
    if all(one.time is not None for one in requests):
        requests.sort(key=lambda one: one.time)  # type: ignore[arg-type, return-value]
    analysis = analyze(requests, ServerOptions.from_environment(), slots, chunk, line_ends(tokenizer))
    _print(analysis, tokenizer)
    write_json(json, _figures(analysis, tokenizer, len(skipped)))


def _print(analysis: Analysis, tokenizer: Any) -> None:
    rows = [("all", analysis.all), *((f"{hour:%Y-%m-%d %H:00}", sums) for hour, sums in sorted(analysis.hours.items()))]
    print_table(
        f"{analysis.all.requests} requests, {analysis.all.total} tokens of prompts",
        ("", "requests", "prefix (stock)", "at any position (a3)", "computed by a3", "rows, stock / a3"),
        [
            (
                name,
                str(sums.requests),
                f"{sums.prefix / sums.total:.0%}",
                f"{_known(sums) / sums.total:.0%}",
                f"{sums.rows / sums.total:.0%}",
                f"{sums.gain:.2f}",
            )
            for name, sums in rows
        ],
    )
    print_table(
        "outcome of the requests", ("", "requests"), [(n, str(c)) for n, c in analysis.all.results.most_common()]
    )
    print_table(
        "texts reused most, at other positions",
        ("times", "tokens", "begins with"),
        [(str(one.times), str(one.tokens), tokenizer.decode(one.begin).replace("\n", " ")) for one in _most(analysis)],
    )


def _known(sums: Sums) -> int:
    return sum(sums.tokens[part] for part in ("prefix", "continued", "reused", "recomputed"))


def _most(analysis: Analysis) -> list[Document]:
    return sorted(analysis.documents.values(), key=lambda one: -one.tokens)[:TOP]


def _figures(analysis: Analysis, tokenizer: Any, skipped: int) -> dict[str, Any]:
    def figures(sums: Sums) -> dict[str, Any]:
        return {
            "requests": sums.requests,
            **{part: sums.tokens[part] for part in PARTS},
            "stock_prefix": sums.prefix,
            "rows": sums.rows,
            "gain": round(sums.gain, 4),
            "results": dict(sums.results),
        }

    return {
        "all": figures(analysis.all),
        "hours": {hour.isoformat(): figures(sums) for hour, sums in sorted(analysis.hours.items())},
        "documents": [
            {"times": one.times, "tokens": one.tokens, "begin": tokenizer.decode(one.begin)} for one in _most(analysis)
        ],
        "skipped": skipped,
    }
