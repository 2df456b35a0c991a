"""A prompt explained: the report of the engine, token by token."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from a3_sglang.client import flush
from a3_sglang.reporting.report import PARTS
from helpers.traffic import Traffic, answer

pytestmark = pytest.mark.engine

CHUNK = 512
ENGINE = {"chunked_prefill_size": CHUNK}
OPTIONS = {"A3_EXPLAIN": "on"}


def explained(traffic: Traffic, ids: list[int], donors: list[list[int]] = [], **options: Any) -> dict[str, Any]:  # noqa: B006
    """A prompt's report with its detail, after checking that the two agree."""
    report: dict[str, Any] = traffic.ask(ids, options | {"explain": True})["meta_info"]["a3"]
    detail = report["detail"]
    runs, spans = detail["runs"], detail["spans"]
    assert [start for _, start, _ in runs] == [0, *(end for _, _, end in runs[:-1])]
    assert runs[-1][2] == len(ids)
    counted: Counter[str] = Counter()
    of = {}
    for part, start, end in runs:
        counted[part] += end - start
        of |= dict.fromkeys(range(start, end), part)
    assert {part: counted[part] for part in PARTS} == {part: report[part] for part in PARTS}
    covered = [i for span in spans for i in range(span["start"], span["end"])]
    assert covered == [i for i in range(len(ids)) if of[i] in ("reused", "recomputed")]
    for span in spans:
        start, end, offset = span["start"], span["end"], span["offset"]
        assert any(donor[offset : offset + end - start] == ids[start:end] for donor in donors)
        if span["relevance"] is not None:
            assert len(span["relevance"]) == end - start
            assert min(span["relevance"]) >= 0
    assert (detail["stages"].get("copy_ms", 0) > 0) == bool(spans)
    json.dumps(detail, allow_nan=False)
    return report


@pytest.fixture
def donor(traffic: Traffic) -> list[int]:
    """A prompt of which the documents are cached, and nothing else is."""
    flush(traffic.running)
    traffic.renew()
    ids = traffic.prompt([0, 1, 2, 3])
    traffic.ask(ids, False, tokens=1)
    return ids


def relevance_of(report: dict[str, Any], part: str) -> list[float]:
    values = {
        span["start"] + i: value for span in report["detail"]["spans"] for i, value in enumerate(span["relevance"])
    }
    return [values[i] for name, start, end in report["detail"]["runs"] if name == part for i in range(start, end)]


@pytest.mark.parametrize("selector", ["probe", "a3", "cacheblend"])
def test_the_detail_adds_up_to_the_report(traffic: Traffic, donor: list[int], selector: str) -> None:
    ids = [*traffic.prompt([3, 1])[:-40], *traffic.tokens(20), *traffic.documents[0], *traffic.tokens(40)]
    report = explained(traffic, ids, [donor], selector=selector, keep=False)
    assert report["reason"] is None
    assert min(report[part] for part in PARTS if part != "continued") > 0
    recomputed, reused = (relevance_of(report, part) for part in ("recomputed", "reused"))
    if selector == "probe":  # It also considers how stale a row is.
        assert sum(recomputed) / len(recomputed) > sum(reused) / len(reused)
    else:
        assert min(recomputed) >= max(reused) > 0


def test_steps_of_a_long_prompt_add_up(traffic: Traffic, donor: list[int]) -> None:
    """New text longer than a chunk is computed in full, and the text after it is reused by a later step."""
    new = traffic.tokens(CHUNK + 100)
    ids = [*traffic.system, *traffic.documents[1], *new, *traffic.documents[3], *traffic.tokens(40)]
    report = explained(traffic, ids, [donor], keep=False)
    parts = [part for part, _, _ in report["detail"]["runs"]]
    assert "tail" in parts[:-1]
    for document in (1, 3):
        start = ids.index(traffic.documents[document][40])
        assert any(span["start"] <= start < span["end"] for span in report["detail"]["spans"])
    assert all(span["relevance"] is not None for span in report["detail"]["spans"])


def test_continued_tokens(traffic: Traffic, donor: list[int]) -> None:
    ids = traffic.prompt([2, 0, 1])
    first = explained(traffic, ids, [donor])
    again = explained(traffic, ids, [donor])
    assert again["detail"]["runs"] == [
        ["prefix", 0, first["prefix"]],
        ["continued", first["prefix"], len(ids) - 1],
        ["tail", len(ids) - 1, len(ids)],
    ]
    # A longer prompt continues it and reuses more.
    further = [*ids, *traffic.tokens(20), *traffic.documents[3], *traffic.tokens(40)]
    report = explained(traffic, further, [donor])
    assert report["continued"] > 0
    assert report["reused"] > 0


def test_a_full_prefill_has_a_detail_too(traffic: Traffic, donor: list[int]) -> None:
    ids = traffic.tokens(200)
    assert explained(traffic, ids)["detail"] == {"runs": [["tail", 0, 200]], "spans": [], "stages": {}}
    report = explained(traffic, traffic.prompt([1, 3, 2]), [donor], ratio=1.0, keep=False)
    assert report["recomputed"] > 0
    assert report["reused"] == 0


@pytest.mark.parametrize("selector", ["epic", "random", "reuse"])
def test_a_rule_that_measures_nothing_reports_no_relevance(traffic: Traffic, donor: list[int], selector: str) -> None:
    report = explained(traffic, traffic.prompt([1, 3, 2]), [donor], selector=selector, keep=False)
    assert report["detail"]["spans"]
    assert all(span["relevance"] is None for span in report["detail"]["spans"])


def test_exact_and_fused_donors_are_distinguished(traffic: Traffic, donor: list[int]) -> None:
    new = traffic.documents[5]
    fused = [*traffic.prompt([3, 1])[:-40], *new, *traffic.documents[2], *traffic.tokens(40)]
    assert explained(traffic, fused, [donor])["gap"] >= len(new) - 30
    report = explained(traffic, [*traffic.system, *new, *traffic.documents[0], *traffic.tokens(40)], [donor, fused])
    assert {span["generation"] for span in report["detail"]["spans"]} == {0, 1}


def test_only_requests_that_ask_and_may_get_a_detail(
    traffic: Traffic, donor: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = traffic.prompt([1, 3, 2])
    asked = traffic.ask(ids, {"keep": False, "explain": True})
    plain = traffic.ask(ids, {"keep": False})
    assert answer(asked) == answer(plain)
    report = asked["meta_info"]["a3"]
    assert report.pop("detail")
    assert plain["meta_info"]["a3"] == report
    monkeypatch.delenv("A3_EXPLAIN")
    with pytest.raises(ValueError, match=r"custom_params\.a3\.explain: only a server with --a3-explain on"):
        traffic.ask(ids, {"explain": True})
