"""What it costs in quality to recompute runs of neighbouring rows instead of single rows.

    python benchmarks/runs.py --model DIR --data questions.json --json benchmarks/results/runs-MODEL.json

Asks the questions as ``a3-sglang eval`` does, on the real engine, with the default rule and with the same rule over
runs (``run_selection.py``). All rules probe alike and recompute the same number of rows, so their charged
budgets are equal. Prints mean KL with its standard error, its ratio to that of single rows with a bootstrap interval
over questions, and the geometric mean of the questions' own ratios, in which no single question decides. Single results
are kept in ``--cells``, from which an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch
import typer

from a3_sglang import selectors
from a3_sglang.cli.experiment import Cells, drift_of, experiment
from a3_sglang.client import engine, environment, generate
from a3_sglang.config import DONOR_MODES
from a3_sglang.cpu import serving_dtype
from a3_sglang.drift.model import DriftModel, PaddedBlocks
from a3_sglang.evaluation.runner import Experiment, Key, Result, evaluating
from a3_sglang.selectors import ReusedRows, probe
from run_selection import select_runs

SINGLE = "probe"


@dataclass(frozen=True)
class ProbeRuns(probe.Probe):
    """The default rule over runs of neighbouring rows.

    Attributes:
        lengths, overhead: of :func:`run_selection.select_runs`.
    """

    lengths: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    overhead: float = 0.0

    def select(
        self, scores: Sequence[torch.Tensor], rows: Sequence[ReusedRows], counts: Sequence[int], drift: DriftModel
    ) -> list[torch.Tensor]:
        blocks = [PaddedBlocks(request.lengths, "cpu") for request in rows]
        return [
            select_runs(drift, score.float().cpu(), *request, self.lengths, self.overhead).to(score.device)
            for score, *request in zip(scores, blocks, counts, strict=True)
        ]


RULES: dict[str, dict[str, Any]] = {
    **{f"runs-{length}": {"lengths": (length,)} for length in (8, 16, 32)},
    **{f"mixed-{overhead}": {"overhead": float(overhead)} for overhead in (2, 4, 8)},
}
"""Options by rule: runs of one length, or runs of any length up to 32 at an overhead per run, in rows."""

# The processes of an engine import this file, too, so they know these selectors.
for name, options in RULES.items():
    setattr(probe, name, partial(ProbeRuns, **options))
    selectors._SELECTORS[name] = ("probe", name)


def run_count(report: dict[str, Any]) -> int:
    """Runs of rows that a fusion recomputed, gaps included."""
    computed = [(start, end) for part, start, end in report["detail"]["runs"] if part in ("recomputed", "gap")]
    ends = {end for _, end in computed}
    return sum(start not in ends for start, _ in computed)


@dataclass(frozen=True)
class RunsResult(Result):
    """One question asked in one variant.

    Attributes:
        runs: of rows that were recomputed, gaps included.
    """

    runs: int


def measure(args: argparse.Namespace, asked: Experiment, done: Container[Key]) -> Iterator[RunsResult]:
    """Results of every question, rule and donor mode but those done."""
    for donors in args.donors.split(","):
        wanted = [(rule, args.ratio, donors) for rule in args.rules.split(",")]
        with environment(A3_EXPLAIN="on"), evaluating(asked, donors, partial(engine, args.model)) as evaluation:
            for result in evaluation.ask(wanted, done):
                case = asked.writer.case(asked.questions, result.question)
                option = {"selector": result.selector, "ratio": args.ratio, "keep": False, "explain": True}
                report = generate(evaluation.running, case.prompt, a3=option)["meta_info"]["a3"]
                yield RunsResult(**asdict(result), runs=run_count(report))


def interval(rule: Sequence[float], single: Sequence[float]) -> tuple[float, float]:
    """90% bootstrap interval over questions of the ratio of mean KLs."""
    chooser, pairs = random.Random(0), list(zip(rule, single, strict=True))
    drawn = [[sum(part) for part in zip(*chooser.choices(pairs, k=len(pairs)), strict=True)] for _ in range(2000)]
    ratios = sorted(mine / theirs for mine, theirs in drawn)
    return ratios[len(ratios) // 20], ratios[-len(ratios) // 20]


def table(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per donor mode and rule."""
    by_rule: defaultdict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for cell in cells:
        by_rule[cell["donors"], cell["selector"]][cell["question"]] = cell
    rows = []
    for (donors, rule), found in by_rule.items():
        single = by_rule.get((donors, SINGLE), {})
        numbers = sorted(found.keys() & single.keys())
        if not numbers:
            continue
        kls, theirs = ([part[number]["kl"] for number in numbers] for part in (found, single))
        low, high = interval(kls, theirs)
        rows.append(
            {
                "donors": donors,
                "rule": rule,
                "kl": round(statistics.mean(kls), 5),
                "standard_error": round(statistics.pstdev(kls) / max(len(kls) - 1, 1) ** 0.5, 5),
                "ratio_to_single": round(sum(kls) / sum(theirs), 3),
                "interval": [round(low, 3), round(high, 3)],
                "typical_ratio": round(statistics.geometric_mean(map(truediv, kls, theirs)), 3),
                "charged": round(statistics.mean(found[number]["charged"] for number in numbers), 4),
                "runs": round(statistics.mean(found[number]["runs"] for number in numbers), 1),
                "n": len(numbers),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="JSON file of questions")
    parser.add_argument("--rules", default=",".join([SINGLE, *RULES]), help="comma-separated rules")
    parser.add_argument("--donors", default=",".join(DONOR_MODES), help="comma-separated donor modes")
    parser.add_argument("--ratio", default=0.15, type=float, help="share of the reused rows that is recomputed")
    parser.add_argument("--start", default=0, type=int, help="first question")
    parser.add_argument("--limit", default=24, type=int, help="number of questions")
    parser.add_argument("--dtype", default=serving_dtype()[0])
    parser.add_argument("--cells", default=Path("runs.cells.jsonl"), type=Path, help="file of single results")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    questions = args.model, args.data, "facts", args.start, args.limit, 5, 400, 0
    try:
        asked, settings = experiment(*questions, args.dtype, drift=drift_of(args.model))
        cells = Cells(args.cells, settings, RunsResult)
    except typer.BadParameter as error:
        parser.error(str(error))
    for cell in measure(args, asked, cells):
        cells.keep(cell)
    rows = table([asdict(cell) for cell in cells.values() if cell.ratio == args.ratio])
    if not rows:
        parser.error(f"--rules: add {SINGLE}, with which the others are compared")
    print("| " + " | ".join(rows[0]) + " |\n" + "|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if args.json:
        shared = {"model": Path(args.model).name, "data": args.data.name, "ratio": args.ratio, "dtype": args.dtype}
        args.json.write_text(json.dumps({"rows": rows, **shared, "sglang": settings["sglang"]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
