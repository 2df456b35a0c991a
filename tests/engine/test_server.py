"""The server that users start, over HTTP: native and OpenAI routes, bad options, clients that hang up, retraction."""

from __future__ import annotations

import http.client
import json
import re
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import sglang
from typer.testing import CliRunner

from a3_sglang.cli.app import app
from helpers.server_traffic import RETRACTING, ServerTraffic
from helpers.tolerance import distance, roundings
from helpers.traffic import parts

SERVER = RETRACTING
pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("donors")]


def test_native_route_reports_what_was_reused(server: ServerTraffic) -> None:
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
def test_bad_options_are_a_400_that_names_the_field(server: ServerTraffic, bad: Any, field: str) -> None:
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
def test_the_report_is_in_the_usage_of_openai_answers(
    server: ServerTraffic, route: str, streamed: bool, n: int
) -> None:
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


def test_other_routes_take_options_by_header(server: ServerTraffic) -> None:
    """On every route, the header decides whether the request is fused; the log shows it."""
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
        # The full prefill comes last: after it, the whole prompt is an exact prefix.
        for header, wanted in (('{"keep": false, "ratio": 0.3}', ("fused", "")), ("false", ("full", "off"))):
            before = len(logged())
            status, answer = server.served.request(path, body, {"x-a3": header})
            assert status == 200, (path, answer)
            assert logged()[before:] == [wanted], path
        for bad in ("nonsense", '{"ratio": 2}'):
            status, answer = server.served.request(path, body, {"x-a3": bad})
            assert status == 400, (path, status, answer)
            assert ("x-a3" if bad == "nonsense" else "ratio") in str(answer), path


def test_clients_that_hang_up_leak_no_slots(server: ServerTraffic) -> None:
    """Before, during and after fusion: the server frees their slots."""
    for wait in (0.0, 0.01, 0.05, 0.1, 0.3, 0.6):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        params = {"max_new_tokens": 400, "ignore_eos": True, "custom_params": {"a3": {"ratio": 0.5}}}
        body = {"text": server.text(), "sampling_params": params, "stream": True}
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(wait)
        connection.close()
    server.served.flush()
    assert server.generate(server.text(), True)[0] == 200


def test_frontend_programs_are_fused(server: ServerTraffic) -> None:
    """Programs in SGLang's frontend language need no change."""

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


def test_retracted_requests_are_fused_again(server: ServerTraffic) -> None:
    """A retracted request loses its private slots and gets others; its KV is right again, and all slots are freed."""
    ids = [server.tokenizer.encode(server.text()) for _ in range(4)]
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    params["custom_params"] = {"a3": {"ratio": 1.0, "keep": False}}
    status, outs = server.served.request("/generate", {"input_ids": ids, "sampling_params": params})
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
        server.served.flush()
        whole = (ids[i] + outs[i]["output_ids"])[:length]
        params = {"max_new_tokens": 1, "custom_params": {"a3": False}}
        theirs = server.kv(server.served.request("/generate", {"input_ids": whole, "sampling_params": params})[1])
        for part in ("k", "v"):
            assert distance(mine[part], theirs[part]) < roundings(5)
    assert again
    server.served.flush()


def test_frontend_programs_over_documents(server: ServerTraffic) -> None:
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
    # The documents are fused either by the program's own prefill before the fork, or by each fork.
    assert all(one["continued"] + one["reused"] > 64 and one["reason"] is None for one in state["reports"])
    plain = ask.run([2, 3, 0, 1], False, backend=backend)
    assert [one["reason"] for one in plain["reports"]] == ["off", "off"]
    with pytest.raises(ValueError, match="ratio"):
        Endpoint(server.url, a3={"ratio": 3})


def test_a_prompt_is_explained_only_by_a_server_that_allows_it(server: ServerTraffic, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(server.text())
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["explain", str(tmp_path / "prompt.txt"), "--url", server.url, "-o", str(page)])
    assert done.exit_code == 1
    assert "custom_params.a3.explain: only a server with --a3-explain on" in done.output
    assert "Traceback" not in done.output
    assert not page.exists()
