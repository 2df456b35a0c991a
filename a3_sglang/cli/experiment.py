"""What commands that ask questions share: the questions of an experiment, and single results kept in a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from a3_sglang.cli.common import resolve_dtype
from a3_sglang.config import ServerOptions
from a3_sglang.drift.file import DEFAULT_NAME, find_drift
from a3_sglang.drift.model import DEFAULT
from a3_sglang.evaluation.layouts import load, split_text
from a3_sglang.evaluation.prompts import Writer
from a3_sglang.evaluation.questions import TASKS, make
from a3_sglang.evaluation.runner import Experiment, Key, Result
from a3_sglang.integration.engine import sglang_version
from a3_sglang.json_lines import complete_lines

DataOption = Annotated[
    Path | None,
    typer.Option(
        help='File of questions: JSON or JSON Lines of {"ctxs": [{"title", "text"}], "question", "answers"}, or a file '
        "of LongBench, RULER or QCFuse."
    ),
]
TaskOption = Annotated[str, typer.Option(help=f"Synthetic questions, without --data: {', '.join(TASKS)}.")]
LimitOption = Annotated[int, typer.Option(min=1, help="Questions to ask.")]
StartOption = Annotated[int, typer.Option(min=0, help="Questions to skip.")]
CellsOption = Annotated[Path | None, typer.Option(help="Keep single results in this file and resume from it.")]


def experiment(
    model: str,
    data: Path | None,
    task: str,
    start: int,
    limit: int,
    passages: int,
    passage_tokens: int,
    seed: int,
    dtype: str,
    *,
    shape: str = "last",
    charged: bool = False,
    answers: bool = False,
    drift: str = DEFAULT_NAME,
) -> tuple[Experiment, dict[str, Any]]:
    """Read or make the questions.

    Args:
        model: folder or Hub id.
        data: file of questions; None: those of ``task``.
        task: one of :data:`TASKS`.
        start: questions to skip.
        limit: questions to ask at most.
        passages: number of passages that a question keeps.
        passage_tokens: tokens that a passage keeps; one long text is cut into passages of this length.
        seed: of synthetic questions and of the passages' order.
        dtype: of the model, or "auto".
        shape: of the prompts.
        charged: ratios are charged budgets.
        answers: every variant also generates its own answer.
        drift: the engines' model of drift, see :func:`drift_of`.

    Returns:
        The experiment, and the settings that decide its results.

    Raises:
        typer.BadParameter: there are no such questions.
    """
    from transformers import AutoConfig, AutoTokenizer

    if task not in TASKS:
        raise typer.BadParameter(f"unknown task {task!r}; choose one of {', '.join(TASKS)}", param_hint="--task")
    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        if data is None:
            # One more than is asked: each question takes foreign passages from the next.
            questions = make(task, start + limit + 1, passages, passage_tokens // 25, seed)
        else:
            questions = load(data, partial(split_text, tokenizer=tokenizer, tokens=passage_tokens))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    numbers = range(start, min(start + limit, len(questions) - (data is None)))
    if not numbers:
        raise typer.BadParameter(f"there are only {len(questions)} questions", param_hint="--start")
    served = resolve_dtype(dtype)
    settings = {
        "model_path": model,
        "questions": hashlib.sha256(data.read_bytes()).hexdigest()[:16] if data else task,
        "passages": passages,
        "passage_tokens": passage_tokens,
        "seed": seed,
        "charged": charged,
        "answers": answers,
        "shape": shape,
        "sglang": sglang_version(),
        "dtype": served,
        "drift": drift,
    }
    prefill = 4 * (passages + 2) * (passage_tokens + 32)
    arguments = {"disable_overlap_schedule": True, "chunked_prefill_size": prefill, "dtype": served}
    depth = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
    writer = Writer(tokenizer, passages, passage_tokens, seed, shape)
    return Experiment(questions, numbers, writer, tokenizer, depth, charged, answers, arguments), settings


def drift_of(model: str) -> str:
    """The model of drift that engines started by this process use: "default", or a digest of its constants."""
    try:
        drift, _ = find_drift(ServerOptions.from_environment().drift, model)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return DEFAULT_NAME if drift == DEFAULT else hashlib.sha256(repr(drift).encode()).hexdigest()[:16]


AnyResult = TypeVar("AnyResult", bound=Result)


class Cells(dict[Key, AnyResult]):
    """Single results by key, also kept in a file, from which an interrupted run resumes.

    Args:
        path: of the file; None: none is kept.
        settings: of the run.
        kind: of the results.

    Raises:
        typer.BadParameter: the file holds something else, or results of other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], kind: type[AnyResult]) -> None:
        self._path, self._settings = path, settings
        if path is None or not path.exists():
            return
        for number, line in complete_lines(path):
            try:
                kept = json.loads(line)
                if kept.pop("settings", None) != settings:
                    message = f"{path} holds results of other settings; name another file"
                    raise typer.BadParameter(message, param_hint="--cells")
                result = kind(**kept)
            except (ValueError, TypeError, AttributeError):
                message = f"{path}:{number} is not a result of this command; name another file"
                raise typer.BadParameter(message, param_hint="--cells") from None
            self[result.key] = result

    def keep(self, result: AnyResult) -> None:
        """Add a result."""
        self[result.key] = result
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"settings": self._settings} | asdict(result)) + "\n")
