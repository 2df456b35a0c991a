"""The shadow's predictions against the engine's actual reuse."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from a3_sglang.cli.app import app
from a3_sglang.client import generate
from a3_sglang.config import ServerOptions
from a3_sglang.integration.shadow import Prompt, Shadow
from a3_sglang.integration.startup import line_ends
from a3_sglang.reporting.report import PARTS
from helpers.engines import Engines
from helpers.traffic import Traffic, answer, parts

VARIABLES = {"A3_MIN_SAVING": "0.3333", "A3_OVERHEAD": "0"}
SLOTS, CHUNK = 49_152, 512


def requests(traffic: Traffic) -> list[tuple[list[int], Any]]:
    """200 requests over a moving corpus, with retries, next turns and options."""
    chooser, made = traffic.random, []
    for number in range(200):
        if number % 20 == 0:
            traffic.documents[chooser.randrange(8)] = traffic.tokens(120)
        option = chooser.choice([True, True, True, {"keep": False}, {"ratio": 0.3}, False, {"donor": True}])
        ids = traffic.prompt(question=chooser.choice([20, 40, 600]))
        if made and chooser.random() < 0.3:
            ids = chooser.choice(made[-3:])[0] + traffic.tokens(chooser.choice([0, 30]))
        made.append((ids, option))
    return made


def reports(engines: Engines, tiny: str, asked: list[tuple[list[int], Any]], **options: str) -> list[dict[str, Any]]:
    size = {"max_total_tokens": SLOTS, "chunked_prefill_size": CHUNK}
    running, _ = engines.get(tiny, "a3", VARIABLES | options, **size)
    answers = [generate(running, ids, 4, option)["meta_info"] for ids, option in asked]
    assert all(parts(meta["a3"]) == meta["prompt_tokens"] for meta in answers)
    assert options.get("A3_MODE") != "observe" or all(
        meta["a3"].pop("mode") == "observe" and meta["cached_tokens"] <= meta["prompt_tokens"] for meta in answers
    )
    return [meta["a3"] for meta in answers]


def differ(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Share of the tokens in which two reports differ."""
    off = sum(abs(one[part] - other[part]) for one, other in zip(some, others, strict=True) for part in PARTS) / 2
    return off / sum(map(parts, some))


@pytest.mark.engine
@pytest.mark.parametrize("donors", ["harvest", "compiled"])
def test_observe_and_analyze_predict_what_a3_does(engines: Engines, tiny: str, donors: str):
    """Within 1% of the tokens. Evictions may come in another order, so a pool of a few prompts is further off."""
    asked = requests(Traffic(None, seed=random.randrange(1 << 30)))
    done = reports(engines, tiny, asked, A3_DONORS=donors)
    assert sum(report["reused"] for report in done) > 0.05 * sum(map(parts, done))
    observed = reports(engines, tiny, asked, A3_DONORS=donors, A3_MODE="observe")
    assert differ(done, observed) <= 0.01
    options = ServerOptions(min_saving=0.3333, overhead=0, donors=donors, report="exact")
    shadow, predicted = Shadow(options, SLOTS, CHUNK, line_ends=line_ends(AutoTokenizer.from_pretrained(tiny))), []
    for ids, option in asked:
        prompt = Prompt(ids, option)
        predicted.append(shadow.ask(prompt).report(exact=True))
        shadow.keep(prompt, ids)
    assert differ(done, predicted) <= 0.01


@pytest.mark.engine
def test_observing_changes_nothing(engines: Engines, tiny: str):
    """Answers and cached tokens are those of stock SGLang."""
    asked = requests(Traffic(None, seed=random.randrange(1 << 30)))[:60]
    size = {"max_total_tokens": SLOTS, "chunked_prefill_size": CHUNK}
    answers = []
    for backend, options in ((None, None), ("a3", {"A3_MODE": "observe"})):
        running, _ = engines.get(tiny, backend, options, **size)
        outs = [generate(running, ids, 4, option, return_logprob=True) for ids, option in asked]
        answers.append([(answer(out), out["meta_info"]["cached_tokens"]) for out in outs])
    assert answers[0] == answers[1]


def test_analyze_reads_logs_of_every_kind(tiny: str, tmp_path: Path):
    chooser = random.Random(random.randrange(1 << 30))
    documents = [" ".join(chooser.choices(["river", "stone", "lamp", "garden", "music"], k=200)) for _ in range(4)]

    def text(order: list[int]) -> str:
        return "\n\n".join(documents[i] for i in order) + f"\n\nQuestion {chooser.random()}?"

    chats = [{"messages": [{"role": "user", "content": text(order)}]} for order in ([0, 1, 2], [2, 0, 1], [1, 3, 2])]
    ids = AutoTokenizer.from_pretrained(tiny)(text([3, 1, 0])).input_ids
    lines = [
        json.dumps({"custom_id": "a", "url": "/v1/chat/completions", "body": chats[0], "time": "2026-01-01T10:01:00Z"}),
        json.dumps(
            {"request": chats[1], "response": {"choices": [{"message": {"content": "river"}}]}, "time": 1767265200}
        ),
        json.dumps({**chats[2], "timestamp": "2026-01-01T11:30:00Z"}),
        json.dumps(
            {"text": text([0, 3, 1]), "sampling_params": {"custom_params": {"a3": False}}, "time": 1767268800.5}
        ),
        json.dumps({"input_ids": ids, "time": 1767268900}),
        '{"messages": [',
        json.dumps({"model": "no prompt"}),
        json.dumps(text([2, 1, 0])),
    ]
    log, figures = tmp_path / "log.jsonl", tmp_path / "figures.json"
    log.write_text("\n".join(lines))
    done = CliRunner().invoke(app, ["analyze", str(log), "--model", tiny, "--json", str(figures)])
    assert done.exit_code == 0, done.output
    assert "line 6 skipped" in done.output
    assert "line 7 skipped" in done.output
    found = json.loads(figures.read_text())
    assert found["skipped"] == 2
    assert found["all"]["requests"] == 6
    assert found["all"]["results"]["full: off"] == 1
    assert found["all"]["results"]["fused"] >= 3
    # Only the template is a prefix, and most of the text recurs at other positions.
    assert found["all"]["stock_prefix"] < 0.2 * sum(found["all"][part] for part in PARTS)
    assert found["all"]["gain"] > 1.5
    assert found["documents"][0]["times"] >= 2


def test_analyze_takes_spans_shorter_than_a_block_and_blank_lines(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A prompt's tail has 32 tokens at least, so of a known ending of 40 only 8 are reused, half a block."""
    draw = random.Random(random.randrange(1 << 30))

    def tokens(count: int) -> list[int]:
        return [draw.randrange(5, 400) for _ in range(count)]

    monkeypatch.setenv("A3_OVERHEAD", "0")
    text, ending = tokens(800), tokens(40)
    prompts = [[*tokens(50), *text, *tokens(30), *ending] for _ in range(3)]
    lines = [json.dumps({"input_ids": ids}) for ids in prompts]
    log, figures = tmp_path / "log.jsonl", tmp_path / "figures.json"
    log.write_text("\n\n".join([*lines, "{"]))
    done = CliRunner().invoke(app, ["analyze", str(log), "--model", tiny, "--json", str(figures)])
    assert done.exit_code == 0, done.output
    assert "line 7 skipped" in done.output
    found = json.loads(figures.read_text())
    assert found["all"]["results"]["fused"] == 2
    assert found["all"]["reused"] + found["all"]["recomputed"] > 2 * (len(text) - 32)


def test_analyze_of_a_file_without_requests_says_so(tiny: str, tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"model": 1}\n')
    done = CliRunner().invoke(app, ["analyze", str(log), "--model", tiny])
    assert done.exit_code == 2
    assert "no line is a request" in done.output
