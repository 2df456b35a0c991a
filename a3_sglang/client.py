"""What the subcommands share: engines, prompts, tables, figures."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from a3_sglang.cli.output import VERBOSE, working
from a3_sglang.cpu import SERVER_ARGUMENTS, serving_dtype
from a3_sglang.integration import compat

console = Console()

ModelOption = Annotated[str, typer.Option(help="Model folder or Hub id.")]
DtypeOption = Annotated[
    str, typer.Option(help="Dtype of the model, by SGLang's name; auto: on a CPU what runs fast on it.")
]
VerboseOption = Annotated[bool, typer.Option(VERBOSE, help="Show what SGLang and its libraries print.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]


def resolve_dtype(dtype: str) -> str:
    """The dtype that a command serves its model in, which is printed with the reason."""
    import torch

    reason = "given with --dtype"
    if dtype == "auto":
        dtype, reason = ("auto", "the model's own") if torch.cuda.is_available() else serving_dtype()
    console.print(f"dtype {dtype}: {reason}", highlight=False)
    return dtype


def engine_arguments(model: str, **overrides: Any) -> dict[str, Any]:
    """Arguments of ``sglang.Engine``; on a machine without a GPU those with which SGLang runs on the CPU."""
    import torch

    level = "warning" if VERBOSE in sys.argv else "error"
    arguments: dict[str, Any] = {"model_path": model, "log_level": level, "random_seed": 1}
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        arguments |= SERVER_ARGUMENTS | {
            "dtype": serving_dtype()[0],
            "max_total_tokens": 65536,
            "mem_fraction_static": 0.5,
        }
    return arguments | overrides


@contextmanager
def engine(model: str, backend: str | None, **overrides: Any) -> Iterator[Any]:
    """A running engine; ``backend`` None is stock SGLang. Shut down whatever happens."""
    import sglang

    name = f"SGLang {sglang.__version__} " + (f"with --radix-cache-backend {backend}" if backend else "as it is")
    if backend is not None:
        overrides["radix_cache_backend"] = backend
    with working(f"starting {name}"):
        running = sglang.Engine(**engine_arguments(model, **overrides))
    try:
        yield running
    finally:
        running.shutdown()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for the processes an engine spawns; set back afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Prompts:
    """Prompts of random tokens: a system part, chunks in any order, a question.

    Args:
        vocabulary: tokens are drawn below it.
        context: tokens of system part and chunks together.
        chunks: how many chunks.
        seed: of the draw.
    """

    def __init__(self, vocabulary: int, context: int, chunks: int, seed: int, question: int = 48) -> None:
        self.random = random.Random(seed)
        self.vocabulary = vocabulary
        self.question_tokens = question
        system = min(32, context // 8)
        self.system = self.tokens(system)
        size = (context - system) // chunks
        self.chunks = [self.tokens(size) for _ in range(chunks)]
        self._order: list[int] = []

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return len(self.system) + sum(map(len, self.chunks)) + self.question_tokens

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(5, self.vocabulary) for _ in range(count)]

    def renew(self) -> None:
        """Draw all chunks and the system part anew."""
        self.system = self.tokens(len(self.system))
        self.chunks = [self.tokens(len(chunk)) for chunk in self.chunks]

    def shuffled(self) -> list[int]:
        """The chunks in another order than the last time, with a new question."""
        order = self.random.sample(range(len(self.chunks)), len(self.chunks))
        while order == self._order:
            self.random.shuffle(order)
        self._order = order
        return self.system + [token for i in order for token in self.chunks[i]] + self.tokens(self.question_tokens)


def vocabulary_of(model: str) -> int:
    """Size of the model's vocabulary, less what may be special tokens at its end."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    text = getattr(config, "text_config", config)
    return int(text.vocab_size) - 64


def flush(running: Any, patience: float = 30) -> None:
    """Empty an engine's cache.

    SGLang refuses while anything is in use, and an answer may arrive before its slots are given back.

    Raises:
        RuntimeError: still refused after ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while not running.flush_cache().success:
        if time.monotonic() > deadline:
            raise RuntimeError("the cache cannot be flushed: something is still held")
        time.sleep(0.1)


def generate(
    running: Any,
    ids: Sequence[int],
    tokens: int = 1,
    a3: Any = None,
    custom_params: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One greedy request; ``a3`` becomes ``custom_params["a3"]`` beside what else is in there."""
    out: dict[str, Any] = compat.ask(
        running, input_ids=list(ids), sampling_params=_greedy(tokens, a3, custom_params), **more
    )
    return out


def generate_all(running: Any, prompts: Sequence[Sequence[int]], a3: Any = None) -> list[dict[str, Any]]:
    """One token each of several greedy requests, sent at once."""
    params = [_greedy(1, a3, None) for _ in prompts]
    out: list[dict[str, Any]] = compat.ask(running, input_ids=[list(ids) for ids in prompts], sampling_params=params)
    return out


def _greedy(tokens: int, a3: Any, custom_params: dict[str, Any] | None) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    custom = (custom_params or {}) | ({} if a3 is None else {"a3": a3})
    return params | ({"custom_params": custom} if custom else {})


def write_json(path: Path | None, figures: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)
