"""Shows the gain on a real server: `make demo`.

Starts SGLang's server with `--radix-cache-backend a3` on the loopback interface and asks questions over passages of
CPython's documentation through the OpenAI client, each over other passages in another order. Every question is asked
twice: with fusion off (a full prefill, as in stock SGLang) and with a3.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from a3_sglang.cli.output import silence, steps, working
from a3_sglang.cpu import serving_dtype
from a3_sglang.local_server import local_server

PASSAGES = ("assert", "del", "pass", "break", "continue", "global", "nonlocal", "return", "yield", "import")
QUESTIONS = (
    "What does the assert statement do when its expression is false?",
    "What happens to a name that the del statement removes?",
    "When is the pass statement useful?",
    "What does the global statement declare?",
    "Which loop does the break statement leave?",
)
SYSTEM = "You answer questions about Python from the passages of its documentation."
SLOW_QUESTIONS = 3
"""Number of questions on a CPU without bfloat16 instructions, on which a prompt takes three times as long."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--questions", type=int, help=f"default {len(QUESTIONS)}, in float32 {SLOW_QUESTIONS}")
    parser.add_argument("--passages", type=int, default=6, help="passages in a prompt")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="dtype of the model; auto: one that is fast on this machine")
    parser.add_argument("--verbose", action="store_true", help="show what the libraries print")
    args = parser.parse_args()
    if args.questions is not None and not 1 <= args.questions <= len(QUESTIONS):
        parser.error(f"--questions: from 1 to {len(QUESTIONS)}, not {args.questions}")
    if not 1 <= args.passages <= len(PASSAGES):
        parser.error(f"--passages: from 1 to {len(PASSAGES)}, not {args.passages}")
    if not args.verbose:
        silence()

    console = Console()
    dtype, reason = serving_dtype() if on_cpu() else ("auto", "the model's own")
    if args.dtype != "auto":
        dtype, reason = args.dtype, "given with --dtype"
    if dtype == "float32" and args.questions is None:
        args.questions = SLOW_QUESTIONS
    args.questions = args.questions or len(QUESTIONS)
    console.print(f"dtype {dtype}: {reason}. {args.questions} questions, each asked twice.", highlight=False)
    chooser = random.Random(args.seed)
    names = [name for name in PASSAGES if name in topics]
    texts = {name: " ".join(topics[name].split())[:1800] for name in names}
    log = Path(tempfile.mkdtemp(prefix="a3-demo-")) / "server.log"
    arguments = ["--dtype", dtype]
    if on_cpu():
        arguments += ["--max-total-tokens", "32768", "--chunked-prefill-size", "8192"]
    with ExitStack() as stack:
        with working("starting the server", console):
            url = stack.enter_context(local_server(args.model, log, *arguments))
        # Imported here, as the import takes a second that the server needs to start anyway.
        from openai import OpenAI

        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        rows = []
        with working("prefilling the passages once, in another order", console):
            for group in (names[: len(names) // 2], names[len(names) // 2 :]):
                ask(client, prompt(group, texts, "What are these passages about?"), fuse=False, salt=None)
        with steps("asking", args.questions, console=console) as step:
            for number, question in enumerate(QUESTIONS[: args.questions]):
                chosen = chooser.sample(names, args.passages)
                text = prompt(chosen, texts, question)
                # With the salt, the full prefill finds nothing in the cache.
                full_ms, full_answer, _ = ask(client, text, fuse=False, salt=f"full-{number}")
                a3_ms, a3_answer, report = ask(client, text, fuse=True, salt=None)
                rows.append((question, report, full_ms, a3_ms, full_answer, a3_answer))
                step()
    show(console, rows)
    if not all(report["reason"] is None for _, report, *_ in rows):
        console.print("[red]A question was answered without fusion.[/red]")
        return 1
    return 0


def on_cpu() -> bool:
    return os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"


def prompt(chosen: list[str], texts: dict[str, str], question: str) -> str:
    passages = "\n\n".join(f"Passage about {name}:\n{texts[name]}" for name in chosen)
    return f"{passages}\n\nQuestion: {question} Answer in one sentence."


def ask(client: Any, text: str, fuse: bool, salt: str | None) -> tuple[float, str, dict[str, Any]]:
    """Milliseconds to the first token, the answer, and the report of reuse."""
    messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    extra: dict[str, Any] = {"custom_params": {"a3": fuse}}
    if salt is not None:
        extra["extra_key"] = salt
    started, first, pieces, report = time.perf_counter(), 0.0, [], {}
    for chunk in client.chat.completions.create(
        model="default",
        messages=messages,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            pieces.append(chunk.choices[0].delta.content)
        if chunk.usage:
            report = chunk.usage.a3
    return (first - started) * 1e3, "".join(pieces), report


def show(console: Console, rows: list[tuple[Any, ...]]) -> None:
    table = Table(title="Full prefill (fusion off) against a3: time to first token", show_lines=True)
    table.add_column("question, answer of each")
    for column in ("tokens", "TTFT"):
        table.add_column(column, no_wrap=True)
    for question, report, full_ms, a3_ms, full_answer, a3_answer in rows:
        names = {"prefix": "exact", "reused": "reused", "recomputed": "recomputed", "gap": "gap", "tail": "tail"}
        parts = "\n".join(f"{report[key]:5} {name}" for key, name in names.items())
        times = f"full {full_ms:5.0f} ms\na3   {a3_ms:5.0f} ms\n     {full_ms / a3_ms:5.1f}x"
        full, fused = escape(full_answer.strip()), escape(a3_answer.strip())
        answers = f"[bold]{question}[/bold]\n[dim]full:[/dim] {full}\n[dim]a3:[/dim]   {fused}"
        table.add_row(answers, parts, times)
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
