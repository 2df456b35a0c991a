"""The server that users start, over HTTP: native and OpenAI routes, bad options, clients that hang up, retraction."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import sglang
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer
from typer.testing import CliRunner

from a3_sglang.cli.app import app
from a3_sglang.local_server import local_server
from a3_sglang.reporting.report import PARTS
from helpers.engines import OPTIONS, STARTS
from helpers.tolerance import distance, roundings
from helpers.traffic import WORDS, parts

pytestmark = pytest.mark.engine


class Server:
    """A running ``launch_server`` and texts to ask it about."""

    def __init__(self, url: str, model: str, folder: Path, log: Path) -> None:
        self.tokenizer, self.folder, self.log = AutoTokenizer.from_pretrained(model), folder, log
        self.url, self.random = url, random.Random(random.randrange(1 << 30))
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.documents = [" ".join(self.random.choices(WORDS, k=80)) + "." for _ in range(6)]

    def text(self, order: list[int] | None = None) -> str:
        chosen = order or self.random.sample(range(6), 4)
        number = self.random.randrange(1 << 20)
        return "\n\n".join(self.documents[i] for i in chosen) + f"\n\nQuestion {number}: which word stands first?"

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=body if isinstance(body, bytes) else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"} | (headers or {}),
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, text: str, a3: Any, tokens: int = 4) -> tuple[int, Any]:
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": {"a3": a3}}
        return self.post("/generate", {"text": text, "sampling_params": params})

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """All samples of SGLang's metrics, by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}

    def kv(self, out: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What was in the slots after the last extend, (layers, tokens, kv_heads, head_dim) each."""
        return torch.load(self.folder / f"{out['meta_info']['id']}.pt")

    def flushed(self) -> bool:
        """SGLang flushes only if nothing is in use."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            request = urllib.request.Request(f"{self.url}/flush_cache", data=b"")
            try:
                with urllib.request.urlopen(request, timeout=30):
                    return True
            except urllib.error.HTTPError:
                time.sleep(0.3)
        return False


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    # SGLang's own switch: while decoding, every now and then some requests lose their slots and wait again.
    retract = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "12"}
    arguments = ["--dtype", os.environ["A3_TEST_DTYPE"], "--max-total-tokens", "32768"]
    arguments += ["--chunked-prefill-size", "8192", "--enable-metrics", "--log-requests"]
    started = time.monotonic()
    with local_server(model, log, *arguments, variables=OPTIONS | {"A3_DUMP_KV": str(folder)} | retract) as url:
        STARTS.add(time.monotonic() - started)
        yield Server(url, model, folder, log)
        assert Server(url, model, folder, log).flushed(), log.read_text()[-3000:]


@pytest.fixture(autouse=True)
def donors(server: Server) -> None:
    """Every test starts with the six documents in the tree and nothing else."""
    assert server.flushed()
    for half in ([0, 1, 2], [3, 4, 5]):
        status, out = server.generate(server.text(half), False)
        assert status == 200
        assert out["meta_info"]["a3"]["reason"] == "off"


def test_native_route_reports_what_was_reused(server: Server) -> None:
    status, out = server.generate(server.text([5, 1, 3]), True)
    report = out["meta_info"]["a3"]
    assert status == 200
    assert report["reason"] is None
    assert report["reused"] > 64
    assert parts(report) == out["meta_info"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"ratio": 2}, "custom_params.a3.ratio"),
        ({"ratio": "half"}, "custom_params.a3.ratio"),
        ({"selector": "best"}, "custom_params.a3.selector"),
        ({"min_span": 1}, "custom_params.a3.min_span"),
        ({"surprise": 1}, "custom_params.a3.surprise"),
        ({"explain": True}, "custom_params.a3.explain"),
        (3, "custom_params.a3"),
    ],
)
def test_bad_options_are_a_400_that_names_the_field(server: Server, bad: Any, field: str) -> None:
    status, message = server.generate(server.text(), bad)
    assert status == 400
    assert field in message
    for create, said in (
        (server.openai.chat.completions.create, {"messages": [{"role": "user", "content": server.text()}]}),
        (server.openai.completions.create, {"prompt": server.text()}),
    ):
        with pytest.raises(openai.BadRequestError, match=field.replace(".", r"\.")):
            create(model="default", max_tokens=2, extra_body={"custom_params": {"a3": bad}}, **said)
    status, out = server.generate(server.text(), {"ratio": 0.3})
    assert status == 200
    assert out["meta_info"]["a3"]["reason"] is None


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("n", [1, 2])
def test_the_report_is_in_the_usage_of_openai_answers(server: Server, route: str, streamed: bool, n: int) -> None:
    text = server.text([2, 4, 0])
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}
    if route == "chat":
        create, prompt = server.openai.chat.completions.create, {"messages": [{"role": "user", "content": text}]}
    else:
        create, prompt = server.openai.completions.create, {"prompt": text}
    params = {"custom_params": {"a3": {"ratio": 0.2}}, "ignore_eos": True}
    answer = create(model="default", max_tokens=3, n=n, extra_body=params, **prompt, **more)
    if streamed:
        chunks = list(answer)
        assert sum(bool(chunk.choices) for chunk in chunks) >= 2
        assert all(not chunk.choices for chunk in chunks if chunk.usage)
        answer = chunks[-1]
    usage = answer.usage
    assert usage is not None
    reports = [usage.a3] if n == 1 else usage.a3
    assert len(reports) == n
    for report in reports:
        assert parts(report) == usage.prompt_tokens
        assert report["reason"] is None
    computed = sum(reports[0][name] for name in ("recomputed", "gap", "tail"))
    if n == 1:
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - computed


def test_other_routes_take_options_by_header(server: Server) -> None:
    """Each route's request is fused or not as the header says, and the log says so."""
    routes: list[tuple[str, str, dict[str, Any]]] = [
        ("/generate", "text", {"sampling_params": {"max_new_tokens": 2}}),
        ("/generate", "text", {}),
        ("/v1/chat/completions", "messages", {"max_tokens": 2}),
        ("/v1/completions", "prompt", {"max_tokens": 2}),
        ("/v1/messages", "messages", {"max_tokens": 2}),
        ("/v1/responses", "input", {"max_output_tokens": 2}),
        ("/api/chat", "messages", {"stream": False, "options": {"num_predict": 2}}),
        ("/api/generate", "prompt", {"stream": False, "options": {"num_predict": 2}}),
    ]

    def logged() -> list[tuple[str, str]]:
        found = re.findall(r"a3: request \w+: (\w+)(?: \(([^)]*)\))?, prefix", server.log.read_text())
        return [(result, reason) for result, reason in found]

    name = server.openai.models.list().data[0].id
    for path, field, more in routes:
        text = server.text()
        said = [{"role": "user", "content": text}] if field == "messages" else text
        body = {"model": name, field: said, **more}
        # The full prefill comes last: after it, all of the prompt is an exact prefix.
        for header, wanted in (('{"keep": false, "ratio": 0.3}', ("fused", "")), ("false", ("full", "off"))):
            before = len(logged())
            status, answer = server.post(path, body, {"x-a3": header})
            assert status == 200, (path, answer)
            assert logged()[before:] == [wanted], path
        for bad in ("nonsense", '{"ratio": 2}'):
            status, answer = server.post(path, body, {"x-a3": bad})
            assert status == 400, (path, status, answer)
            assert ("x-a3" if bad == "nonsense" else "ratio") in str(answer), path


def test_clients_that_hang_up_leave_nothing_behind(server: Server) -> None:
    """Before, in and after fusion: the server lets go of what they held."""
    for wait in (0.0, 0.01, 0.05, 0.1, 0.3, 0.6):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        params = {"max_new_tokens": 400, "ignore_eos": True, "custom_params": {"a3": {"ratio": 0.5}}}
        body = {"text": server.text(), "sampling_params": params, "stream": True}
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(wait)
        connection.close()
    assert server.flushed()
    assert server.generate(server.text(), True)[0] == 200


def test_frontend_programs_are_fused(server: Server) -> None:
    """A program of SGLang's frontend language needs no change."""

    @sglang.function
    def compare(s: Any, first: str, second: str) -> None:
        s += first
        s += second
        s += sglang.gen("answer", max_tokens=3, temperature=0)

    url = server.url
    state = compare.run(server.text([4, 5]), server.text([0, 3]), backend=sglang.RuntimeEndpoint(url))
    report = state.get_meta_info("answer")["a3"]
    assert report["reason"] is None
    assert report["reused"] + report["recomputed"] > 64


def test_retracted_requests_are_fused_again(server: Server) -> None:
    """A retracted request loses its private slots and gets others; its KV is right again, and all come back."""
    ids = [server.tokenizer.encode(server.text()) for _ in range(4)]
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    params["custom_params"] = {"a3": {"ratio": 1.0, "keep": False}}
    status, outs = server.post("/generate", {"input_ids": ids, "sampling_params": params})
    assert status == 200
    retracted = [i for i, out in enumerate(outs) if out["meta_info"]["num_retractions"]]
    assert retracted
    for prompt, out in zip(ids, outs, strict=True):
        assert out["meta_info"]["completion_tokens"] == 40
        assert out["meta_info"]["a3"]["reason"] is None
        assert parts(out["meta_info"]["a3"]) == len(prompt)
    again = 0
    for i in retracted:
        mine = server.kv(outs[i])
        length = mine["k"].shape[1]
        # A request that was retracted before its first batch has nothing after its prompt.
        again += length > len(ids[i])
        assert server.flushed()
        whole = (ids[i] + outs[i]["output_ids"])[:length]
        params = {"max_new_tokens": 1, "custom_params": {"a3": False}}
        theirs = server.kv(server.post("/generate", {"input_ids": whole, "sampling_params": params})[1])
        for part in ("k", "v"):
            assert distance(mine[part], theirs[part]) < roundings(5)
    assert again
    assert server.flushed()


def test_log_and_metrics_say_of_every_request_what_became_of_it(server: Server) -> None:
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


def test_every_panel_of_the_dashboard_has_data(server: Server) -> None:
    """Each selector of each query finds samples of the server, or of an event that has not happened yet."""
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


def test_frontend_programs_over_documents(server: Server) -> None:
    """Forks inherit a program's options and continue its context; reports can be read; choices are scored."""
    from a3_sglang.frontend import Endpoint, documents, report

    backend = Endpoint(server.url)

    @sglang.function
    def ask(s: Any, order: list[int], options: Any) -> None:
        if options is not None:
            s["a3"] = options
        s += documents(server.documents[i] for i in order) + "Of which words does it speak? "
        forks = s.fork(2)
        for number, fork in enumerate(forks):
            fork += f"Answer {number}: "
            fork += sglang.gen("answer", max_tokens=4, temperature=0)
        forks.join()
        s["reports"] = [report(fork, "answer") for fork in forks]
        s += sglang.gen("word", choices=["river", "stone"], temperature=0)

    ask.run([0, 1, 2, 3], None, backend=backend)
    state = ask.run([3, 1, 0, 2], None, backend=backend)
    assert state["word"] in ("river", "stone")
    # Either the program's own prefill before the fork has fused the documents, or each fork does.
    assert all(one["continued"] + one["reused"] > 64 and one["reason"] is None for one in state["reports"])
    plain = ask.run([2, 3, 0, 1], False, backend=backend)
    assert [one["reason"] for one in plain["reports"]] == ["off", "off"]
    with pytest.raises(ValueError, match="ratio"):
        Endpoint(server.url, a3={"ratio": 3})


def test_a_prompt_is_explained_only_by_a_server_that_allows_it(server: Server, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(server.text())
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["explain", str(tmp_path / "prompt.txt"), "--url", server.url, "-o", str(page)])
    assert done.exit_code == 1
    assert "custom_params.a3.explain: only a server with --a3-explain on" in done.output
    assert "Traceback" not in done.output
    assert not page.exists()
