"""The programs in examples/, run as users run them, and the commands of the recipes; their output has to be true."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from helpers.serving import Served

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TOWN = json.loads((EXAMPLES / "town.json").read_text(encoding="utf-8"))


class Counts(NamedTuple):
    """Tokens of a prompt, as a program printed them."""

    exact: int
    continued: int
    reused: int
    computed: int


COUNTS = re.compile(", ".join(rf"{name} (\d+)" for name in Counts._fields))


def run(*command: str, folder: Path | None = None, **variables: str) -> str:
    """Output of a program, which has to succeed."""
    done = subprocess.run(
        [sys.executable, "-P", *command],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def example(name: str, *arguments: str) -> str:
    return run(str(EXAMPLES / name), *arguments)


def counts(printed: str) -> list[Counts]:
    """The printed counts, one per prompt, each next to a measured time."""
    return [Counts(*map(int, found)) for found in COUNTS.findall(printed)]


def times(printed: str) -> list[int]:
    return [int(found) for found in re.findall(r"(\d+) ms", printed)]


def full(one: Counts) -> bool:
    return one.continued == one.reused == 0 and one.computed > 0.9 * sum(one)


def test_offline_engine(model: str) -> None:
    """It does not use the shared server, which is stopped before: only one of the two runs at a time."""
    printed = example("engine.py", "--model", model)
    first, *others = counts(printed)
    assert full(first)
    assert len(others) == 3
    assert all(one.reused > 0.6 * sum(one) and one.computed < 0.4 * sum(one) for one in others)
    assert len(times(printed)) == 2


@pytest.fixture
def url(shared_server: Served) -> str:
    """URL of the server, whose cache is empty."""
    shared_server.flush()
    return shared_server.url


def test_openai_client(url: str) -> None:
    printed = example("openai_client.py", "--url", url, "--questions", "2")
    first, *others = counts(printed)
    assert full(first)
    assert len(others) == 2
    assert all(one.reused > 0.6 * sum(one) and one.computed < 0.4 * sum(one) for one in others)
    assert len(times(printed)) == 2
    assert all(times(printed))


def test_langchain(url: str) -> None:
    printed = example("langchain_rag.py", "--url", url)
    first, *others = counts(printed)
    assert full(first)
    assert len(others) == 3
    assert all(one.reused > 0.3 * sum(one) for one in others)
    ((cached, of),) = re.findall(r"cached (\d+) of (\d+)", printed)
    assert 0.3 * int(of) < int(cached) < int(of)
    assert len(times(printed)) == 5


def test_llamaindex(url: str) -> None:
    printed = example("llamaindex_rag.py", "--url", url)
    first, *others = counts(printed)
    assert full(first)
    assert len(others) == 4
    assert all(one.reused > 0.3 * sum(one) for one in others)
    assert len(times(printed)) == 5


def test_chat_over_documents(url: str) -> None:
    printed = example("chat_over_documents.py", "--url", url, "--turns", "6")
    other, first, *later = counts(printed)
    assert full(other)
    assert first.reused > 0.6 * sum(first)
    assert len(later) == 5
    # Later turns compute their own text and the answer before it.
    assert all(one.computed < first.computed / 2 for one in later)
    assert all(one.exact + one.continued > 0.9 * sum(one) for one in later)
    assert [sum(one) for one in later] == sorted(sum(one) for one in later)
    assert all(times(printed))


def test_warm_on_upload(url: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.txt" for number in range(2)]
    for file, passage in zip(files, TOWN["passages"], strict=False):
        file.write_text(passage["text"])
    for known in (False, True):
        printed = example("warm_on_upload.py", *map(str, files), "--url", url)
        found = re.findall(r"(\d)\.txt: (\d+) tokens, of them (\d+) known before", printed)
        assert [name for name, _, _ in found] == ["0", "1"]
        for _, tokens, cached in found:
            assert int(tokens) > 100
            assert (int(cached) == int(tokens) - 1) == known


def test_frontend_program(url: str) -> None:
    printed = example("frontend_program.py", "--url", url)
    reports = [ast.literal_eval(found) for found in re.findall(r"(\{.*\})$", printed, re.MULTILINE)]
    assert len(reports) == 4
    assert all(report["continued"] + report["reused"] == 0 for report in reports[:2])
    assert all(report["continued"] + report["reused"] > 300 for report in reports[2:])
    assert len(re.findall("museum: (?:yes|no)$", printed, re.MULTILINE)) == 2


def test_agent_tools(url: str) -> None:
    first, second = counts(example("agent_tools.py", "--url", url))
    assert full(first)
    # Four of the five results were in the first task.
    assert second.reused > 0.5 * sum(second)


def test_other_routes(url: str) -> None:
    printed = example("other_routes.py", "--url", url)
    lines = printed.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        route for route in ("/v1/messages", "/v1/responses", "/api/chat") for _ in range(2)
    ]
    cached = [(int(a), int(b)) for a, b in re.findall(r"cached (\d+) of (\d+)", printed)]
    assert len(cached) == 4
    first, *others = cached
    assert first[0] < 100 < 1000 < first[1]
    assert all(0.6 * of < known < of for known, of in others)
    assert all(int(tokens) > 1000 for tokens in re.findall(r"(\d+) tokens of prompt", printed))


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The town as conversations of ShareGPT, or as a folder of texts."""
    if request.param == "conversations":
        pairs = zip(TOWN["questions"], TOWN["passages"], strict=True)
        turns = [
            [{"from": "human", "value": question}, {"from": "gpt", "value": passage["text"]}]
            for question, passage in pairs
        ]
        file = tmp_path / "conversations.json"
        file.write_text(json.dumps([{"id": str(i), "conversations": turn} for i, turn in enumerate(turns)]))
        return file
    folder = tmp_path / "texts"
    folder.mkdir()
    for suffix, some in ((".txt", TOWN["passages"][:6]), (".md", TOWN["passages"][6:])):
        (folder / f"town{suffix}").write_text("\n\n".join(f"{one['title']}: {one['text']}" for one in some))
    return folder


@pytest.mark.parametrize("source", ["conversations", "folder"], indirect=True)
def test_bench_serving_reads_the_dataset(source: Path, model: str, tmp_path: Path) -> None:
    data = tmp_path / "shuffled.jsonl"
    example("sharegpt_to_bench.py", str(source), str(data), "--prompts", "6", "--words", "100")
    from sglang.benchmark.datasets.custom import sample_custom_requests

    rows = sample_custom_requests(str(data), 6, AutoTokenizer.from_pretrained(model))
    assert len(rows) == 6
    orders = set()
    for row in rows:
        places = {one["title"]: row.prompt.find(one["text"]) for one in TOWN["passages"]}
        found = sorted((place, title) for title, place in places.items() if place >= 0)
        assert len(found) == 8
        orders.add(tuple(title for _, title in found))
        assert row.prompt_len > 1000
        assert row.output_len > 4
    assert len(orders) == 6


@pytest.mark.parametrize("source", ["conversations"], indirect=True)
def test_bench_serving_runs(url: str, shared_server: Served, model: str, source: Path, tmp_path: Path) -> None:
    """Run the second command of the docstring, which adds a header to the first."""
    example("sharegpt_to_bench.py", str(source), str(tmp_path / "shuffled.jsonl"), "--prompts", "4", "--words", "100")
    text = (EXAMPLES / "sharegpt_to_bench.py").read_text().replace("\\\n", " ")
    fused, full = (shlex.split(found) for found in re.findall(r"python (-m sglang\.bench_serving .*)", text))
    assert full == [*fused, "--header", "x-a3=false"]
    replaced = {"http://127.0.0.1:30000": url, "MODEL": model, "shuffled.jsonl": str(tmp_path / "shuffled.jsonl")}
    replaced["64"] = "4"
    before = len(shared_server.log.read_text())
    printed = run(*(replaced.get(word, word) for word in full), folder=tmp_path)
    assert re.search(r"Successful requests: +4 *$", printed, re.MULTILINE), printed
    batches = re.findall(
        r"A3 batch, #fused: (\d+), #continued: (\d+), .*off: (\d+)", shared_server.log.read_text()[before:]
    )
    assert batches
    assert all((one, two) == ("0", "0") for one, two, _ in batches)


def curl_commands() -> list[str]:
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return [found for page in pages for found in re.findall(r"```bash\n(curl .*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.parametrize("command", curl_commands())
def test_curl_commands_of_the_docs(shared_server: Served, command: str) -> None:
    _, silent, address, header, content, data, body = shlex.split(command)
    assert (silent, header, content, data) == ("-s", "-H", "Content-Type: application/json", "-d")
    answer = shared_server.post(address.removeprefix("http://127.0.0.1:30000"), json.loads(body))
    report = answer["usage"]["a3"] if "usage" in answer else answer["meta_info"]["a3"]
    assert report["tail"] > 0
