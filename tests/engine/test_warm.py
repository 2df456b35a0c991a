"""Documents that are prefilled ahead of time, on a real server with each kind of donors."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from a3_sglang.cli.app import app
from a3_sglang.documents import documents
from a3_sglang.local_server import local_server
from a3_sglang.warm import Document, ServerError, Warmed, server_info, warm
from helpers.engines import OPTIONS, STARTS
from helpers.serving import flush
from helpers.traffic import WORDS

pytestmark = pytest.mark.engine

SYSTEM = "Answer in one word."
POOL = 4096
TRIMMING = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""A chat template that strips messages, as those of several model families do."""


@dataclass
class Server:
    """A server, and documents that are new to it."""

    url: str
    donors: str
    stack: ExitStack
    folder: Path
    tokenizer: Any
    random: random.Random

    def documents(self, number: int, words: int = 120) -> list[Document]:
        texts = [" ".join(self.random.choices(WORDS, k=words)) for _ in range(number)]
        # Half of them end in a full stop, which some tokenizers merge with a blank line.
        return [Document(f"Page {i}: {text}{'.' * (i % 2)}", f"page {i}") for i, text in enumerate(texts)]

    def file(self, *lines: Document | str) -> Path:
        path = self.folder / f"{self.random.randrange(1 << 40)}.jsonl"
        records = [
            line if isinstance(line, str) else json.dumps({"text": line.text, "name": line.name}) for line in lines
        ]
        path.write_text("\n".join(records) + "\n")
        return path

    def ask(self, chosen: list[Document]) -> tuple[dict[str, int], int]:
        """The report of a question over documents, and the number of tokens of their texts."""
        text = documents(one.text for one in chosen)
        question = (
            f"Question {self.random.randrange(1 << 20)}: which of these pages is the last one, and which the first?"
        )
        answer = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0).chat.completions.create(
            model="default",
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text + question}],
            max_tokens=2,
        )
        assert answer.usage is not None
        report: dict[str, int] = answer.usage.a3  # type: ignore[attr-defined]
        return report, len(self.tokenizer.encode(text))

    def flush(self) -> None:
        flush(self.url, self.folder / "log")


@pytest.fixture(scope="module", params=["harvest", "compiled"])
def running(request: pytest.FixtureRequest, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("warm")
    arguments = ["--dtype", os.environ["A3_TEST_DTYPE"], "--max-total-tokens", str(POOL), "--context-length", "3000"]
    arguments += ["--a3-donors", request.param]
    if request.param == "compiled":
        template = folder / "trimming.jinja"
        template.write_text(TRIMMING)
        arguments += ["--chat-template", str(template)]
    with ExitStack() as stack:
        started = time.monotonic()
        url = stack.enter_context(local_server(tiny, folder / "log", *arguments, variables=OPTIONS))
        STARTS.add(time.monotonic() - started)
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        yield Server(url, request.param, stack, folder, tokenizer, random.Random(random.randrange(1 << 30)))


@pytest.fixture
def server(running: Server) -> Server:
    running.flush()
    return running


def invoke(*arguments: Any, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["warm", *map(str, arguments)], input=stdin)


def test_a_prompt_over_warmed_documents_computes_its_question_only(server: Server) -> None:
    pages = server.documents(6)
    results = list(warm(server.url, pages, system=SYSTEM, concurrency=3))
    assert {one.document.name for one in results} == {one.name for one in pages}
    assert all(one.error is None and one.cached < 64 < one.tokens for one in results)
    chosen = server.random.sample(pages, 4)
    report, tokens = server.ask(chosen)
    assert report["reason"] is None
    # With compiled donors the exact prefix is whole blocks, and the rest of the first document is a gap.
    assert report["gap"] < (32 if server.donors == "compiled" else 1)
    found = sum(report[part] for part in ("prefix", "continued", "reused", "recomputed"))
    assert found + report["gap"] >= tokens
    assert report["recomputed"] < report["reused"]
    again = list(warm(server.url, pages, system=SYSTEM))
    assert [one.document for one in again] == pages
    assert all(one.cached == one.tokens - 1 for one in again)


def test_a_document_that_cannot_be_prefilled_is_a_result(server: Server) -> None:
    good = server.documents(1)[0]
    given = [Document(" \n", "empty"), Document("word " * 3100, "long"), good]
    empty, long, last = warm(server.url, given, system=SYSTEM)
    assert empty == Warmed(given[0], 0, 0, "the document is empty")
    assert long.error is not None
    assert "3000" in long.error
    assert (last.document, last.error) == (good, None)


def test_documents_are_taken_as_they_are_sent(server: Server) -> None:
    taken: list[str] = []

    def endless() -> Iterator[Document]:
        for page in server.documents(50, words=20):
            taken.append(page.name)
            yield page

    results = warm(server.url, endless(), concurrency=2)
    next(results)
    assert len(taken) == 2
    next(results)
    assert len(taken) <= 4
    results.close()  # type: ignore[attr-defined]
    assert len(taken) <= 4


def test_the_command_names_wrong_lines_and_resumes(server: Server) -> None:
    pages = server.documents(5)
    source = server.file(pages[0], "{broken", *pages[1:4], '{"messages": []}', pages[4], pages[0])
    figures, done = server.folder / "figures.json", server.folder / f"{source.stem}-done.jsonl"
    arguments = (source, "--url", server.url, "--system", SYSTEM, "--resume", done, "--json", figures)

    def run(*more: Any) -> tuple[Result, dict[str, Any]]:
        result = invoke(*arguments, *more)
        return result, json.loads(figures.read_text())

    result, first = run("--rate", 50)
    assert result.exit_code == 1
    assert [one["place"] for one in first["failed"]] == [f"{source}:2", f"{source}:6"]
    assert all(f"{source}:{number} skipped: " in result.stdout.replace("\n", "") for number in (2, 6))
    assert (first["warmed"], first["skipped"]) == (5, 1)
    info = server_info(server.url)
    assert info.token_bytes is not None
    assert first["kv_bytes"] == round(first["tokens"] * info.token_bytes)
    assert info.slots == first["slots"] == POOL
    assert server.ask([pages[3], pages[1], pages[4]])[0]["gap"] < 32

    _, second = run()
    assert (second["warmed"], second["skipped"], second["computed"]) == (0, 6, 0)
    assert second["tokens"] == first["tokens"]
    server.flush()
    result, third = run()
    assert "emptied" in result.stdout
    assert (third["warmed"], third["skipped"]) == (5, 1)
    assert abs(third["computed"] - first["computed"]) < 64
    clean = server.file(*pages)
    assert invoke(clean, "--url", server.url, "--system", SYSTEM, "--resume", done).exit_code == 0
    elsewhere = invoke(clean, "--url", server.url, "--resume", done, "--json", figures)
    assert elsewhere.exit_code == 0
    assert json.loads(figures.read_text())["warmed"] == 5


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_full_pool_ends_the_run_before_anything_is_evicted(server: Server, concurrency: int) -> None:
    pages = server.documents(40)
    lines = server.file(*pages).read_bytes()
    figures = server.folder / "figures.json"
    arguments = ("-", "--url", server.url, "--system", SYSTEM, "--concurrency", concurrency, "--json", figures)
    result = invoke(*arguments, stdin=lines)
    assert result.exit_code == 1
    assert result.stdout.count("of the KV pool (") == 1
    stopped = json.loads(figures.read_text())
    assert stopped["full"]
    assert stopped["left_out"]
    assert 0.9 * POOL <= stopped["tokens"] <= POOL
    warmed = pages[: stopped["warmed"]]
    assert 0 < len(warmed) < len(pages)
    assert all(one.cached == one.tokens - 1 for one in warm(server.url, warmed, system=SYSTEM))
    result = invoke(*arguments, "--evict", stdin=lines)
    assert result.exit_code == 0
    assert result.stdout.count("of the KV pool (") == 1
    assert json.loads(figures.read_text())["warmed"] == len(pages)


def test_a_server_that_goes_away_ends_the_iteration(running: Server) -> None:
    """The last test, as it stops the server."""
    pages = running.documents(5)

    def until_stopped() -> Iterator[Document]:
        for number, page in enumerate(pages):
            if number == 2:
                running.stack.close()
            yield page

    results = warm(running.url, until_stopped(), system=SYSTEM)
    assert [next(results).error, next(results).error] == [None, None]
    with pytest.raises(ServerError, match="does not answer"):
        next(results)
