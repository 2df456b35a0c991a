"""``a3-sglang eval``: how far every selector's answers are from the full prefill's, on the real engine."""

from __future__ import annotations

import hashlib
import json as json_module
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from a3_sglang.cli.common import (
    JsonOption,
    ModelOption,
    engine,
    environment,
    generate,
    print_table,
    progress_console,
    write_json,
)
from a3_sglang.config import DONOR_MODES, known_selector
from a3_sglang.evaluation import scores
from a3_sglang.evaluation.prompts import Case, Writer
from a3_sglang.evaluation.questions import TASKS, Question, load, make
from a3_sglang.server.debug import ANSWER_KEY, LOGITS_VARIABLE

ANSWER_TOKENS = 12
NOISE = "noise"
"""Another plain request for the same prompt: what the engine's own rounding makes of it."""


@dataclass(frozen=True)
class Cell:
    """One question asked in one way."""

    question: int
    selector: str
    ratio: float
    donors: str
    kl: float
    agreement: float
    f1: float
    em: float
    charged: float

    @property
    def key(self) -> tuple[int, str, float, str]:
        return self.question, self.selector, self.ratio, self.donors


class Evaluation:
    """Asks one question at a time, alone in the engine.

    Args:
        running: the engine.
        folder: where it leaves logits.
        tokenizer: of the model.
    """

    def __init__(self, running: Any, folder: Path, tokenizer: Any) -> None:
        self.running, self.folder, self.tokenizer = running, folder, tokenizer

    def cells(
        self, number: int, case: Case, right: tuple[str, ...], wanted: list[tuple[str, float, str]]
    ) -> Iterator[Cell]:
        """One question in all wanted ways ``(selector, ratio, donors)``."""
        self._flush()
        reference, plain = self._ask(case.prompt, False, ANSWER_TOKENS)
        teacher = plain["output_ids"]
        end = teacher.index(self.tokenizer.eos_token_id) + 1 if self.tokenizer.eos_token_id in teacher else len(teacher)
        teacher = teacher[:end]
        reference = reference[:end]

        def cell(way: tuple[str, float, str], option: Any) -> Cell:
            logits, out = self._ask(case.prompt, option, teacher)
            report = out["meta_info"]["a3"]
            if option is not False and report["reason"] is not None:
                raise RuntimeError(f"fusion did not engage: {report}")
            said = teacher
            if scores.agreement(reference, logits) < 1:
                # It would have said something else by itself.
                said = self._ask(case.prompt, option, ANSWER_TOKENS)[1]["output_ids"]
            text = self._text(said)
            return Cell(
                number,
                *way,
                kl=scores.divergence(reference, logits),
                agreement=scores.agreement(reference, logits),
                f1=scores.f1(text, right),
                em=scores.exact_match(text, right),
                charged=report["charged"],
            )

        for donors in dict.fromkeys(way[2] for way in wanted):
            if any(way[0] == NOISE for way in wanted if way[2] == donors):
                # The first request left the prompt in the tree, so this one computes little of it again.
                yield cell((NOISE, 0.0, donors), False)
            self._flush()
            for ids in case.donors[donors]:
                generate(self.running, ids, a3=False)
            for selector, ratio, mode in wanted:
                if mode == donors and selector != NOISE:
                    yield cell((selector, ratio, donors), {"selector": selector, "ratio": ratio})

    def _ask(self, ids: list[int], option: Any, answer: int | list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits (tokens, vocabulary) and the engine's answer; a list of token ids is forced on it."""
        count = answer if isinstance(answer, int) else len(answer)
        out = generate(self.running, ids, count, option, custom_params={ANSWER_KEY: answer})
        path = self.folder / f"{out['meta_info']['id']}.pt"
        logits: torch.Tensor = torch.load(path)
        path.unlink()
        return logits, out

    def _text(self, ids: list[int]) -> str:
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _flush(self) -> None:
        if not self.running.flush_cache().success:
            raise RuntimeError("the cache cannot be flushed: something is still held")


def evaluate(
    model: ModelOption,
    data: Annotated[Path | None, typer.Option(help="JSON file of questions with passages and answers.")] = None,
    task: Annotated[str, typer.Option(help=f"Made-up questions, without --data: {', '.join(TASKS)}.")] = "facts",
    selectors: Annotated[str, typer.Option(help="Comma-separated rules.")] = "probe,epic,random,reuse",
    ratios: Annotated[str, typer.Option(help="Comma-separated shares of reused tokens to recompute.")] = "0.15",
    donors: Annotated[str, typer.Option(help="Comma-separated: harvest, compiled.")] = "harvest",
    limit: Annotated[int, typer.Option(min=1, help="Questions to ask.")] = 24,
    passages: Annotated[int, typer.Option(min=2, help="Passages a question keeps.")] = 5,
    passage_tokens: Annotated[int, typer.Option(min=64, help="Tokens a passage keeps.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed of made-up questions and of the passages' order.")] = 0,
    cells: Annotated[Path | None, typer.Option(help="Keep single results here and go on from them.")] = None,
    json: JsonOption = None,
) -> None:
    """Mean KL divergence to the full prefill, agreement, F1 and exact match of every selector.

    Every prompt is asked on the real engine: first with fusion off, which is the reference; then its passages are
    left in the tree by other requests (see --donors), and each selector answers. For KL and agreement the reference's
    greedy answer is forced, 12 tokens at most. The row `full` recomputes everything, `noise` is the reference asked
    again.
    """
    from transformers import AutoTokenizer

    ways = parse_ways(selectors, ratios, donors)
    if task not in TASKS:
        raise typer.BadParameter(f"unknown task {task!r}; choose one of {', '.join(TASKS)}", param_hint="--task")
    try:
        questions = load(data) if data else make(task, limit, passages, passage_tokens // 25, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = Writer(tokenizer, passages, passage_tokens, seed)
    count = min(limit, len(questions))
    settings = _settings(model, questions, passages, passage_tokens, seed)
    done = {cell.key: cell for cell in _kept(cells, settings)}
    with (
        tempfile.TemporaryDirectory(prefix="a3-eval-") as folder,
        environment(**{LOGITS_VARIABLE: folder, "A3_MIN_REUSE": "64"}),
        Progress(console=progress_console) as progress,
        engine(
            model, "a3", disable_overlap_schedule=True, chunked_prefill_size=4 * (passages + 2) * (passage_tokens + 32)
        ) as running,
    ):
        asking = Evaluation(running, Path(folder), tokenizer)
        steps = progress.add_task("asking", total=count * len(ways), completed=0)
        for number in range(count):
            missing = [way for way in ways if (number, *way) not in done]
            progress.advance(steps, len(ways) - len(missing))
            if not missing:
                continue
            case = writer.case(questions, number)
            for cell in asking.cells(number, case, questions[number].answers, missing):
                done[cell.key] = cell
                _keep(cells, settings, cell)
                progress.advance(steps)
    rows = [summary(way, [done[(number, *way)] for number in range(count)]) for way in ways]
    title = (
        f"a3-sglang eval {model}, {count} questions of {data or task}, {passages} passages of {passage_tokens} tokens"
    )
    columns = ("selector", "ratio", "donors", "kl", "agreement", "f1", "em", "charged", "n")
    print_table(title, columns, [[row[name] for name in columns] for row in rows])
    write_json(json, {"rows": rows, "data": str(data or task), "model": model, **settings})


def parse_ways(selectors: str, ratios: str, donors: str) -> list[tuple[str, float, str]]:
    """All combinations ``(selector, ratio, donors)``, with the reference rows first in every donor mode.

    Raises:
        typer.BadParameter: names the option and what it accepts.
    """
    try:
        names = [known_selector(name.strip()) for name in selectors.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--selectors") from None
    try:
        shares = [float(ratio) for ratio in ratios.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise typer.BadParameter(f"numbers between 0 and 1, with commas, not {ratios!r}", param_hint="--ratios")
    modes = [mode.strip() for mode in donors.split(",")]
    if unknown := set(modes) - set(DONOR_MODES):
        message = f"unknown donor mode {sorted(unknown)[0]!r}; choose from {', '.join(DONOR_MODES)}"
        raise typer.BadParameter(message, param_hint="--donors")
    ways: list[tuple[str, float, str]] = []
    for mode in modes:
        ways += [(NOISE, 0.0, mode), ("full", 1.0, mode)]
        # The ratio says nothing to these two.
        fixed = {"full": 1.0, "reuse": 0.0}
        ways += [(name, fixed.get(name, share), mode) for name, share in product(names, shares)]
    return list(dict.fromkeys(ways))


def summary(way: tuple[str, float, str], cells: list[Cell]) -> dict[str, Any]:
    """The row of one way over all questions."""
    row: dict[str, Any] = dict(zip(("selector", "ratio", "donors"), way, strict=True))
    for name in ("kl", "agreement", "f1", "em", "charged"):
        row[name] = round(statistics.mean(getattr(cell, name) for cell in cells), 5)
    return row | {"n": len(cells)}


def _settings(model: str, questions: list[Question], passages: int, passage_tokens: int, seed: int) -> dict[str, Any]:
    """What single results depend on; kept beside them."""
    import sglang

    text = "".join(question.model_dump_json() for question in questions)
    return {
        "model_path": model,
        "questions": hashlib.sha256(text.encode()).hexdigest()[:16],
        "passages": passages,
        "passage_tokens": passage_tokens,
        "seed": seed,
        "sglang": sglang.__version__,
    }


def _kept(path: Path | None, settings: dict[str, Any]) -> Iterator[Cell]:
    """Single results of a run that was cut off."""
    if path is None or not path.exists():
        return
    for line in path.read_text().splitlines():
        kept = json_module.loads(line)
        if kept.pop("settings") != settings:
            raise typer.BadParameter(f"{path} holds results of other settings; name another file", param_hint="--cells")
        yield Cell(**kept)


def _keep(path: Path | None, settings: dict[str, Any], cell: Cell) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json_module.dumps({"settings": settings} | asdict(cell)) + "\n")
