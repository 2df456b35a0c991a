"""The server's log, metrics and dashboard account for every request."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from a3_sglang.reporting.report import PARTS
from helpers.server_traffic import RETRACTING, ServerTraffic

SERVER = RETRACTING
pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("donors")]


def test_log_and_metrics_account_for_every_request(server: ServerTraffic) -> None:
    def counted() -> Counter[tuple[str, ...]]:
        return Counter(
            {
                (
                    name.removeprefix("sglang:a3_"),
                    *(value for key, value in sorted(labels) if key != "model_name"),
                ): value
                for (name, labels), value in server.metrics().items()
                if name in ("sglang:a3_requests_total", "sglang:a3_tokens_total")
            }
        )

    before, reports = counted(), {}
    expected: Counter[tuple[str, ...]] = Counter()
    fresh = " ".join(server.random.choices("abcdefghijklmnop", k=200))
    retried = server.text()
    asked = [(server.text(), option) for option in (True, {"ratio": 0.3}, {"selector": "epic"}, False, {"donor": True})]
    asked += [(retried, True), (retried, True), (fresh, True), ("Hello", True)]
    for text, option in [*asked, *asked, (retried, True), (fresh, False)]:
        status, out = server.generate(text, option, 1)
        assert status == 200
        reports[out["meta_info"]["id"]] = out["meta_info"]["a3"]
    assert len(reports) == 20
    logged = {
        rid: (
            result,
            reason or None,
            {name: int(count) for name, count in (pair.split() for pair in counts.split(", "))},
        )
        for rid, result, reason, counts in re.findall(
            r"a3: request (\w+): (\w+)(?: \(([^)]*)\))?, (prefix .*)$", server.log.read_text(), re.MULTILINE
        )
    }
    for rid, report in reports.items():
        result, reason, counts = logged[rid]
        assert counts == {name: report[name] for name in PARTS}
        assert (result == "full") == (report["continued"] + report["reused"] + report["recomputed"] == 0)
        assert reason == (report["reason"] if result == "full" else None)
        expected["requests_total", reason or "", result] += 1
        for name, count in counts.items():
            expected["tokens_total", "exact" if name == "prefix" else name] += count
    assert {result for result, _, _ in logged.values()} == {"fused", "continued", "full"}
    assert {reason for _, reason, _ in logged.values()} >= {None, "off", "donor", "nothing to reuse"}
    assert {key: value for key, value in (counted() - before).items() if value} == {
        k: v for k, v in expected.items() if v
    }
    log = server.log.read_text()
    batches = re.findall(r"A3 batch, #fused: (\d+), #continued: (\d+), #full: (\d+), ", log)
    for result, counts in zip(("fused", "continued", "full"), zip(*batches, strict=True), strict=True):
        assert sum(map(int, counts)) == len(re.findall(rf"a3: request \w+: {result}", log)) > 0


def test_every_panel_of_the_dashboard_has_data(server: ServerTraffic) -> None:
    """Each selector of each query matches samples of the server, except for events that have not happened."""
    for text in (server.text(), server.text()):
        server.generate(text, True)
    samples = server.metrics()
    board = json.loads((Path(__file__).parents[2] / "docs" / "monitoring" / "a3-dashboard.json").read_text())
    rare = {"sglang:a3_failures_total"}
    for panel in board["panels"]:
        for target in panel["targets"]:
            selectors = re.findall(r"([a-z0-9_]+:[a-z0-9_]+)\{([^}]*)\}", target["expr"])
            assert selectors, panel["title"]
            for name, matchers in selectors:
                wanted = {
                    label: value.replace("$model_name", ".*")
                    for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers)
                }
                found = [
                    value
                    for (other, labels), value in samples.items()
                    if other == name
                    and all(re.fullmatch(value, dict(labels).get(label, "")) for label, value in wanted.items())
                ]
                assert found or name in rare, (panel["title"], name, wanted)
                grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
                for label in {one.strip() for group in grouped for one in group.split(",")}:
                    assert name in rare or any(label in dict(labels) for (other, labels) in samples if other == name), (
                        panel["title"],
                        label,
                    )
