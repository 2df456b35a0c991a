"""Draws docs/monitoring/a3-dashboard.json from a live server, without Grafana: for docs/operating.md.

    python tools/pictures/dashboard.py --model MODEL -o docs/dashboard.png

It starts a server, asks questions over shuffled passages for some minutes, and starts a Prometheus (Debian and Ubuntu:
apt-get install prometheus) that scrapes the server and evaluates the panels' queries.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from a3_sglang.local_server import free_port, local_server

BOARD = Path(__file__).resolve().parents[2] / "docs" / "monitoring" / "a3-dashboard.json"
VARIABLES = {"$model_name": ".*", "$__rate_interval": "20s"}
PASSAGES = ("assert", "del", "pass", "break", "continue", "global", "nonlocal", "return", "yield", "import")


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """A running Prometheus that scrapes ``target`` ("host:port") every second; yields its URL."""
    binary = shutil.which("prometheus")
    if binary is None:
        raise SystemExit("error: there is no prometheus on the PATH; on Debian and Ubuntu: apt-get install prometheus")
    config, port = folder / "prometheus.yml", free_port()
    # docs/operating.md explains why SGLang's names are restored.
    restored = "metric_relabel_configs: [{source_labels: [__name__], regex: 'sglang_(.*)', target_label: __name__, "
    restored += "replacement: 'sglang:$1'}]"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: sglang, static_configs: [{{targets: ['{target}']}}], {restored}}}]\n"
    )
    command = [binary, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def load(url: str, seconds: float) -> None:
    """Ask over shuffled passages: new questions, retries, full prefills and new text."""
    from openai import OpenAI

    client, chooser = OpenAI(base_url=f"{url}/v1", api_key="none"), random.Random(1)
    texts = [" ".join(topics[name].split())[:1200] for name in PASSAGES if name in topics]
    end, text = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        kind = chooser.random()
        if kind > 0.25 or not text:
            text = "\n\n".join(chooser.sample(texts, 4)) + f"\n\nWhat does part {chooser.randrange(9)} say?"
        elif kind < 0.1:
            text = " ".join(str(chooser.randrange(10_000)) for _ in range(300))
        client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": text}],
            max_tokens=8,
            extra_body={"custom_params": {"a3": chooser.random() > 0.1}},
        )


def check(url: str) -> None:
    """Raise SystemExit with Prometheus' message if it could not scrape the server."""
    with urllib.request.urlopen(f"{url}/api/v1/targets", timeout=60) as answer:
        (target,) = json.loads(answer.read())["data"]["activeTargets"]
    if target["health"] != "up":
        raise SystemExit(f"error: Prometheus could not scrape the server: {target['lastError']}")


def series(url: str, expression: str, begin: float, end: float) -> list[tuple[dict[str, str], list[list[Any]]]]:
    """Labels and samples of every series that a query returns for a time range."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    query = urllib.parse.urlencode({"query": expression, "start": begin, "end": end, "step": 2})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=60) as answer:
        return [(one["metric"], one["values"]) for one in json.loads(answer.read())["data"]["result"]]


def draw(url: str, begin: float, end: float, out: Path) -> None:
    """One plot per panel of the dashboard, arranged as in its grid."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    board = json.loads(BOARD.read_text())
    rows = 1 + max(panel["gridPos"]["y"] for panel in board["panels"]) // board["panels"][0]["gridPos"]["h"]
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2)
    for panel in board["panels"]:
        grid = panel["gridPos"]
        plot = axes[grid["y"] // grid["h"], grid["x"] // grid["w"]]
        plot.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold")
        for target in panel["targets"]:
            for labels, values in series(url, target["expr"], begin, end):
                legend = re.sub(
                    r"{{(\w+)}}", lambda name, labels=labels: labels.get(name[1], ""), target["legendFormat"]
                )
                points = [(at - begin, float(value)) for at, value in values if not math.isnan(float(value))]
                if points:
                    plot.plot(*zip(*points, strict=True), label=legend, linewidth=1.5)
        if panel["fieldConfig"]["defaults"].get("unit") == "percentunit":
            plot.yaxis.set_major_formatter(PercentFormatter(1))
        elif panel["fieldConfig"]["defaults"].get("unit") == "s":
            plot.set_ylabel("s")
        plot.set_ylim(bottom=0)
        plot.grid(alpha=0.3)
        if plot.lines:
            plot.legend(fontsize=7, loc="upper left", ncols=2)
    for plot in axes[-1]:
        plot.set_xlabel("seconds")
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--seconds", type=float, default=150, help="of load")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="a3-dashboard-") as name:
        folder = Path(name)
        with (
            local_server(
                args.model, folder / "server.log", "--enable-metrics", "--max-total-tokens", "32768"
            ) as server,
            prometheus(server.removeprefix("http://"), folder) as url,
        ):
            begin = time.time()
            load(server, args.seconds)
            check(url)
            draw(url, begin, time.time(), args.out)


if __name__ == "__main__":
    main()
