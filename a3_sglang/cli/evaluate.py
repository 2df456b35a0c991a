"""``a3-sglang eval``: how far every selector's answers are from the full prefill's, on the real engine."""

from __future__ import annotations

import hashlib
import json as json_module
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from a3_sglang.cli.output import steps
from a3_sglang.client import (
    DtypeOption,
    JsonOption,
    ModelOption,
    VerboseOption,
    engine,
    environment,
    flush,
    generate,
    print_table,
    resolve_dtype,
    write_json,
)
from a3_sglang.config import AUTO, DONOR_MODES, check_combination, check_ratio, check_selector
from a3_sglang.evaluation import metrics
from a3_sglang.evaluation.prompts import SHAPES, Case, Writer
from a3_sglang.evaluation.questions import TASKS, load, make
from a3_sglang.integration.debug import ANSWER_KEY, LOGITS_VARIABLE
from a3_sglang.selectors import Ratio, make_selector

ANSWER_TOKENS = 12
NOISE = "noise"
"""Another plain request for the same prompt: what the engine's own rounding makes of it."""
FIXED: dict[str, Ratio] = {"full": 1.0, "reuse": 0.0}
"""Rules to which the ratio says nothing."""

Way = tuple[str, Ratio, str]
"""How a question is asked: selector, ratio, donors."""


@dataclass(frozen=True)
class Cell:
    """One question asked in one way."""

    question: int
    selector: str
    ratio: Ratio
    donors: str
    kl: float
    agreement: float
    f1: float
    em: float
    charged: float

    @property
    def key(self) -> tuple[int, str, Ratio, str]:
        return self.question, self.selector, self.ratio, self.donors


class Evaluation:
    """Asks one question at a time, alone in the engine.

    Args:
        running: the engine.
        donors: the mode it runs in.
        folder: where it leaves logits.
        tokenizer: of the model.
        depth: layers of the model.
        charged: ratios are charged budgets, see :meth:`_ratio`.
    """

    def __init__(self, running: Any, donors: str, folder: Path, tokenizer: Any, depth: int, charged: bool) -> None:
        self.running, self.donors, self.folder, self.tokenizer = running, donors, folder, tokenizer
        self.depth, self.charged = depth, charged
        self._reports: dict[str, dict[str, Any]] = {}
        """What each rule spends on this question where it recomputes next to nothing."""

    def cells(self, number: int, case: Case, right: tuple[str, ...], wanted: list[Way]) -> Iterator[Cell]:
        """One question in all wanted ways, whose donors are this engine's."""
        flush(self.running)
        reference, plain = self._ask(case.prompt, False, ANSWER_TOKENS)
        teacher = plain["output_ids"]
        end = teacher.index(self.tokenizer.eos_token_id) + 1 if self.tokenizer.eos_token_id in teacher else len(teacher)
        teacher = teacher[:end]
        reference = reference[:end]

        def cell(way: Way, option: Any) -> Cell:
            logits, out = self._ask(case.prompt, option, teacher)
            report = out["meta_info"]["a3"]
            # What `full` computed before is exact, so that the prompt may be a prefix and nothing is left to fuse.
            if option is not False and way[0] != "full" and report["reason"] is not None:
                raise RuntimeError(f"fusion did not engage: {report}")
            said = teacher
            if metrics.agreement(reference, logits) < 1:
                # It would have said something else by itself.
                said = self._ask(case.prompt, option, ANSWER_TOKENS)[1]["output_ids"]
            text = self._text(said)
            return Cell(
                number,
                *way,
                kl=metrics.divergence(reference, logits),
                agreement=metrics.agreement(reference, logits),
                f1=metrics.f1(text, right),
                em=metrics.exact_match(text, right),
                charged=report["charged"],
            )

        if any(way[0] == NOISE for way in wanted):
            # The first request left the prompt in the tree, so this one computes little of it again; if others come
            # before it, this one computes what they leave of it.
            if case.before:
                flush(self.running)
            for ids in case.before:
                generate(self.running, ids, a3=False)
            yield cell((NOISE, 0.0, self.donors), False)
        self._reports.clear()
        if not case.before:
            self._donate(case)
        for way in wanted:
            if way[0] == NOISE:
                continue
            if case.before:
                self._donate(case)
            option = {"selector": way[0], "ratio": self._ratio(case, way), "keep": bool(case.before)}
            for ids in case.before:
                generate(self.running, ids, a3=option)
            yield cell(way, option)

    def _donate(self, case: Case) -> None:
        """Nothing but the case's donors is in the cache."""
        flush(self.running)
        for ids in case.donors[self.donors]:
            generate(self.running, ids, a3={"donor": True})

    def _ratio(self, case: Case, way: Way) -> Ratio:
        """The nominal ratio of a way; where charged budgets are equal, the one with which the rule costs as much."""
        selector, ratio, _ = way
        if not self.charged or ratio == AUTO or selector in FIXED:
            return ratio
        if selector not in self._reports:
            out = generate(self.running, case.prompt, a3={"selector": selector, "ratio": 0.01, "keep": False})
            self._reports[selector] = out["meta_info"]["a3"]
        report = self._reports[selector]
        reused = report["reused"] + report["recomputed"]
        row = (1 - make_selector(selector).fresh_layers / self.depth) / (reused + report["gap"])
        share = float(min(max((report["recomputed"] + (ratio - report["charged"]) / row) / reused, 0), 1))
        # What matching in whole blocks leaves out counts towards a ratio, so it takes a little more than the share.
        ratio = share
        for _ in range(3):
            out = generate(self.running, case.prompt, a3={"selector": selector, "ratio": ratio, "keep": False})
            missing = share - out["meta_info"]["a3"]["recomputed"] / reused
            if abs(missing) * reused < 1:
                break
            ratio = min(max(ratio + missing, 0.0), 1.0)
        return ratio

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


def evaluate(
    model: ModelOption,
    data: Annotated[Path | None, typer.Option(help="JSON file of questions with passages and answers.")] = None,
    task: Annotated[str, typer.Option(help=f"Made-up questions, without --data: {', '.join(TASKS)}.")] = "facts",
    selectors: Annotated[str, typer.Option(help="Comma-separated rules.")] = "probe,epic,random,reuse",
    ratios: Annotated[
        str, typer.Option(help="Comma-separated shares of reused tokens to recompute, or auto.")
    ] = "0.15",
    charged: Annotated[
        bool, typer.Option("--charged", help="Ratios are charged budgets: every rule recomputes so many rows.")
    ] = False,
    donors: Annotated[str, typer.Option(help="Comma-separated: harvest, compiled.")] = "harvest",
    limit: Annotated[int, typer.Option(min=1, help="Questions to ask.")] = 24,
    start: Annotated[int, typer.Option(min=0, help="Questions to pass over.")] = 0,
    passages: Annotated[int, typer.Option(min=2, help="Passages a question keeps.")] = 5,
    passage_tokens: Annotated[int, typer.Option(min=64, help="Tokens a passage keeps.")] = 400,
    shape: Annotated[
        str, typer.Option(help=f"What prompts look like: {'; '.join(f'{k}: {v}' for k, v in SHAPES.items())}.")
    ] = "last",
    seed: Annotated[int, typer.Option(help="Seed of made-up questions and of the passages' order.")] = 0,
    cells: Annotated[Path | None, typer.Option(help="Keep single results here and go on from them.")] = None,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Mean KL divergence to the full prefill, agreement, F1 and exact match of every selector.

    Every prompt is asked on the real engine: first with fusion off, which is the reference; then its passages are
    left in the tree by other requests, and each selector answers. The passages come from one earlier prompt, in
    another order among foreign ones (harvest), or each was prefilled behind the prompt's own beginning (compiled).
    For KL and agreement the reference's greedy answer is forced, 12 tokens at most. The row `full` recomputes
    everything, `noise` is the reference asked again.
    """
    import sglang
    from transformers import AutoConfig, AutoTokenizer

    ways = parse_ways(selectors, ratios, donors)
    if task not in TASKS:
        raise typer.BadParameter(f"unknown task {task!r}; choose one of {', '.join(TASKS)}", param_hint="--task")
    try:
        # One more is made up than asked: each takes foreign passages from the next.
        questions = load(data) if data else make(task, start + limit + 1, passages, passage_tokens // 25, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(model)
    depth = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}", param_hint="--shape")
    writer = Writer(tokenizer, passages, passage_tokens, seed, shape)
    numbers = range(start, min(start + limit, len(questions) - (data is None)))
    if not numbers:
        raise typer.BadParameter(f"there are only {len(questions)} questions", param_hint="--start")
    count = len(numbers)
    source = hashlib.sha256(data.read_bytes()).hexdigest()[:16] if data else task
    served = resolve_dtype(dtype)
    settings = {
        "model_path": model,
        "questions": source,
        "passages": passages,
        "passage_tokens": passage_tokens,
        "seed": seed,
        "charged": charged,
        "shape": shape,
        "sglang": sglang.__version__,
        "dtype": served,
    }
    done = {cell.key: cell for cell in _kept(cells, settings)}
    prefill = 4 * (passages + 2) * (passage_tokens + 32)
    before = sum((number, *way) in done for number in numbers for way in ways)
    with steps("asking", count * len(ways), before) as step:
        for mode in dict.fromkeys(way[2] for way in ways):
            missing = {n: [way for way in ways if way[2] == mode and (n, *way) not in done] for n in numbers}
            if not any(missing.values()):
                continue
            options = {"A3_MIN_SAVING": "0", "A3_DONORS": mode, "A3_REPORT": "exact"}
            arguments = {"disable_overlap_schedule": True, "chunked_prefill_size": prefill, "dtype": served}
            with (
                tempfile.TemporaryDirectory(prefix="a3-eval-") as folder,
                environment(**options, **{LOGITS_VARIABLE: folder}),
                engine(model, "a3", **arguments) as running,
            ):
                asking = Evaluation(running, mode, Path(folder), tokenizer, depth, charged)
                for number, wanted in missing.items():
                    if not wanted:
                        continue
                    case = writer.case(questions, number)
                    for cell in asking.cells(number, case, questions[number].answers, wanted):
                        done[cell.key] = cell
                        _keep(cells, settings, cell)
                        step()
    rows = [summary(way, [done[(number, *way)] for number in numbers]) for way in ways]
    title = (
        f"a3-sglang eval {model}, {count} questions of {data or task}, {passages} passages of {passage_tokens} tokens, "
        + SHAPES[shape]
    )
    columns = ("selector", "ratio", "donors", "kl", "agreement", "f1", "em", "charged", "n")
    print_table(title, columns, [[row[name] for name in columns] for row in rows])
    write_json(json, {"rows": rows, "data": str(data or task), "model": model, **settings})


def parse_ways(selectors: str, ratios: str, donors: str) -> list[Way]:
    """All combinations ``(selector, ratio, donors)``, with the reference rows first in every donor mode.

    Rules that cannot go with the ratio ``auto`` are left out there.

    Raises:
        typer.BadParameter: names the option and what it accepts.
    """
    try:
        names = [check_selector(name.strip()) for name in selectors.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--selectors") from None
    try:
        shares = [check_ratio(AUTO if ratio.strip() == AUTO else float(ratio)) for ratio in ratios.split(",")]
    except ValueError:
        message = f'numbers between 0 and 1 or "{AUTO}", with commas, not {ratios!r}'
        raise typer.BadParameter(message, param_hint="--ratios") from None
    modes = [mode.strip() for mode in donors.split(",")]
    if unknown := set(modes) - set(DONOR_MODES):
        message = f"unknown donor mode {sorted(unknown)[0]!r}; choose from {', '.join(DONOR_MODES)}"
        raise typer.BadParameter(message, param_hint="--donors")
    ways: list[Way] = []
    for mode in modes:
        ways += [(NOISE, 0.0, mode), ("full", 1.0, mode)]
        for name, share in product(names, shares):
            with suppress(ValueError):
                ways.append(
                    (name, FIXED[name], mode) if name in FIXED else (check_combination(name, share), share, mode)
                )
    return list(dict.fromkeys(ways))


def summary(way: Way, cells: list[Cell]) -> dict[str, Any]:
    """The row of one way over all questions."""
    row: dict[str, Any] = dict(zip(("selector", "ratio", "donors"), way, strict=True))
    for name in ("kl", "agreement", "f1", "em", "charged"):
        row[name] = round(statistics.mean(getattr(cell, name) for cell in cells), 5)
    return row | {"n": len(cells)}


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
