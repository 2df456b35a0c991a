"""Quality against charged budget, measured by ``a3-sglang eval``, as tables and a picture.

Run by ``make quality DATA=questions.json`` from the clone's root. Single results are kept beside the figures in
``benchmarks/results``, so an interrupted run can be resumed. It runs this command::

    python benchmarks/quality.py --model DIR --data questions.json --results benchmarks/results --docs docs
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# Makes the names of the SVG's elements reproducible.
plt.rcParams["svg.hashsalt"] = "a3"

RULES = ("probe", "a3", "cacheblend", "epic", "prophetkv", "qcfuse", "random")
COLUMNS = ("donors", "selector", "ratio", "charged", "kl", "agreement", "f1", "em", "n")
QUESTIONS, HELD_OUT = 24, 10


def runs(data: Path) -> dict[str, list[list[str]]]:
    """Arguments of ``a3-sglang eval`` by name; calls under one name share their single results."""
    both, dev = ["--donors", "harvest,compiled"], ["--data", str(data), "--limit", str(QUESTIONS)]
    held_out = ["--data", str(data), "--start", "30", "--limit", str(HELD_OUT)]
    baselines = ",".join(RULES[1:])
    tasks = {
        f"task-{task}": [["--task", task, "--limit", "6", *both, "--selectors", f"probe,{baselines}"]]
        for task in ("fact", "facts", "tracking", "queries")
    }
    return {
        "questions": [
            [*dev, *both, "--selectors", "probe,reuse", "--ratios", "0.05,0.15,auto,0.3"],
            [*dev, "--donors", "harvest", "--selectors", f"probe,{baselines}", "--ratios", "0.15"],
        ],
        "equal": [[*dev, *both, "--charged", "--selectors", f"probe,{baselines}", "--ratios", "0.15"]],
        "held-out": [[*held_out, *both, "--selectors", f"probe,{baselines}"]],
        "held-out-again": [[*held_out, "--seed", "1", *both, "--selectors", f"probe,{baselines}"]],
        **tasks,
    }


TITLES = {
    "questions": "Questions of the data file",
    "equal": "Questions of the data file at equal charged budget (`--charged`)",
    "held-out": "The last ten questions",
    "held-out-again": "The last ten questions over other passages in another order (`--seed 1`)",
    "task-fact": "One planted fact (`--task fact`)",
    "task-facts": "Many planted facts (`--task facts`)",
    "task-tracking": "Variable tracking (`--task tracking`)",
    "task-queries": "Two facts asked at once (`--task queries`)",
}


def measure(model: str, name: str, calls: list[list[str]], results: Path) -> dict[str, Any]:
    """Run ``eval``, and join and write the rows of its calls."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    figures: dict[str, Any] = {}
    commands = []
    for call in calls:
        out = results / f"quality-{name}.part.json"
        command = ["a3-sglang", "eval", "--model", model, *call]
        kept = ["--cells", str(results / f"quality-{name}.cells.jsonl"), "--json", str(out)]
        subprocess.run([Path(sys.executable).with_name("a3-sglang"), *command[1:], *kept], check=True)
        figures |= json.loads(out.read_text())
        rows |= {(row["donors"], row["selector"], row["ratio"]): row for row in figures["rows"]}
        commands.append(" ".join(["a3-sglang eval --model MODEL", *(Path(a).name if "/" in a else a for a in call)]))
        out.unlink()
    figures |= {"rows": list(rows.values()), "commands": commands, "model": Path(model).name}
    figures["data"] = Path(figures["data"]).name
    figures.pop("model_path")
    (results / f"quality-{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def table(figures: dict[str, Any]) -> str:
    """The commands and a table, by donor mode, lowest KL first."""
    rows = sorted(figures["rows"], key=lambda row: (row["donors"] != "harvest", row["kl"]))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row[column]) for column in COLUMNS) + " |" for row in rows]
    return "\n".join([*("    " + command for command in figures["commands"]), "", *lines])


def draw(every: list[dict[str, Any]], path: Path) -> None:
    """KL against charged budget: a panel per donor mode, a line per selector that starts at ``reuse``."""
    picture, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, donors in zip(panels, ("harvest", "compiled"), strict=True):
        rows = [row for row in every if row["donors"] == donors]
        (reuse,) = (row for row in rows if row["selector"] == "reuse")
        for rule in RULES:
            points = [(r["charged"], r["kl"]) for r in rows if r["selector"] == rule and r["ratio"] != "auto"]
            points = sorted([*points, (reuse["charged"], reuse["kl"])])
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=rule)
        for row in rows:
            if row["ratio"] == "auto":
                panel.plot(row["charged"], row["kl"], "*", color="C0", markersize=11, label="probe, auto")
        panel.set(title=f"{donors} donors", xlabel="charged budget", yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean KL to the full prefill")
    panels[1].legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="JSON file of questions")
    parser.add_argument("--results", default=Path("benchmarks/results"), type=Path)
    parser.add_argument("--docs", default=Path("docs"), type=Path)
    parser.add_argument("--only", default="", help=f"comma-separated names of runs: {', '.join(TITLES)}")
    parser.add_argument("--first", type=int, help="run only the first N calls of each")
    args = parser.parse_args()
    wanted = runs(args.data)
    for name in [name for name in args.only.split(",") if name] or wanted:
        measure(args.model, name, wanted[name][: args.first], args.results)
    parts: list[str] = []
    drawn: dict[str, list[dict[str, Any]]] = {}
    for name, title in TITLES.items():
        path = args.results / f"quality-{name}.json"
        if path.exists():
            figures = json.loads(path.read_text())
            parts.append(f"### {title}\n\n{table(figures)}\n")
            drawn[name] = figures["rows"]
    if drawn.keys() >= {"questions", "equal"}:
        draw(drawn["questions"] + drawn["equal"], args.docs / "quality.svg")
    page = args.results / "quality-tables.md"
    head, rest = page.read_text().split("<!-- figures -->\n")
    _, tail = rest.split("<!-- end of figures -->\n")
    figures_part = "\n".join(parts)
    page.write_text(f"{head}<!-- figures -->\n{figures_part}<!-- end of figures -->\n{tail}")


if __name__ == "__main__":
    main()
