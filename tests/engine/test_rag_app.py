"""The example app in a browser, over a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from a3_sglang.local_server import free_port
from a3_sglang.reporting.report import PARTS
from helpers.serving import Served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FOLDER = Path(__file__).parents[2] / "examples" / "rag_app"
SAMPLES = FOLDER / "samples"
COMPUTED = ("recomputed", "gap", "tail")
MILLISECONDS = 60_000
"""Longest wait for anything on the page."""


@contextmanager
def running_app(url: str) -> Iterator[str]:
    """The app as users start it, for a server, on a free port."""
    port = free_port()
    # With this variable set, the script's folder would not be on its import path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, str(FOLDER / "app.py"), "--url", url, "--port", str(port)]
    app = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/documents", timeout=5).close()
                break
            except urllib.error.URLError:
                assert app.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait(timeout=30)


@pytest.fixture
def problems() -> list[str]:
    """Errors and warnings in the browser's console."""
    return []


@pytest.fixture
def page(browser: Browser, problems: list[str]) -> Iterator[Page]:
    page = browser.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    yield page
    page.close()


HARBOUR = "Who built the harbour, and what does the breakwater consist of?"
CARS = "How many cars does the ferry carry?"
WATCH = """() => {
    window.seen = [];
    const look = () => {
        const card = document.querySelector("article");
        if (card && card.querySelector(".measured").hidden) seen.push(card.querySelector(".text").textContent.length);
        requestAnimationFrame(look);
    };
    look();
}"""
"""Records the length of the growing answer in every frame."""


def expect(target: Any) -> Any:
    """Playwright's ``expect``; imported here, as the environments of older releases of SGLang do not have it."""
    from playwright import sync_api

    sync_api.expect.set_options(timeout=MILLISECONDS)
    return sync_api.expect(target)


def listed(page: Page) -> Any:
    """A context in which something is done that ends with a new list of documents."""
    return page.expect_response(lambda got: got.url.endswith("/documents") and got.request.method == "GET")


def upload(page: Page, *files: Any) -> None:
    with listed(page):
        page.set_input_files("#files", list(files))


def drop(page: Page, file: Path) -> None:
    script = """([name, text]) => {
        const data = new DataTransfer();
        data.items.add(new File([text], name));
        return data;
    }"""
    data = page.evaluate_handle(script, [file.name, file.read_text()])
    with listed(page):
        page.dispatch_event("#drop", "drop", {"dataTransfer": data})


def status(page: Page) -> str:
    return str(page.locator("#upload-status").inner_text())


def ask(page: Page, question: str) -> dict[str, Any]:
    """Ask with the keyboard. Returns the app's events by type, and the whole answer."""
    page.fill("#question", question)
    with page.expect_response("**/ask") as response:
        page.press("#question", "Enter")
    return events(page, response.value.text())


def events(page: Page, lines: str) -> dict[str, Any]:
    found = [json.loads(line) for line in lines.splitlines()]
    expect(page.locator("#ask button")).to_be_enabled()
    return {event["type"]: event for event in found} | {
        "answer": "".join(event["text"] for event in found if event["type"] == "text")
    }


def number(text: str) -> int:
    return int(re.sub(r"\D", "", text))


def computed(sent: dict[str, Any]) -> int:
    return sum(sent["done"]["a3"][part] for part in COMPUTED)


def check_card(page: Page, sent: dict[str, Any]) -> None:
    """The newest card shows what was sent."""
    card, report, total = page.locator("article").first, sent["done"]["a3"], sent["done"]["prompt_tokens"]
    assert sum(report[part] for part in PARTS) == total
    shown = {part: report[part] for part in PARTS if report[part]}
    for part, tokens in shown.items():
        assert number(card.locator(f".counts .count-{part}").inner_text()) == tokens
    assert card.locator(".bar i").count() == card.locator(".counts li").count() == len(shown)
    label = card.locator(".bar").get_attribute("aria-label") or ""
    assert [number(piece) for piece in label.split(", ")] == list(shown.values())
    width = card.locator(".bar").evaluate("bar => bar.clientWidth")
    for part, tokens in shown.items():
        piece = card.locator(f".bar .{part}").evaluate("piece => piece.getBoundingClientRect().width")
        assert piece == pytest.approx(width * tokens / total, abs=10)
    assert f"Computed {computed(sent):,} of the prompt's {total:,} tokens" in card.locator(".summary").inner_text()
    assert card.locator(".text").inner_text().strip() == sent["answer"].strip()
    documents = [one["document"] for one in sent["sources"]["sources"]]
    assert card.locator("figcaption").all_text_contents() == documents
    assert number(card.locator(".times .a3").inner_text()) == round(sent["done"]["ttft_ms"])


@pytest.mark.engine
def test_questions_over_uploaded_documents(shared_server: Served, page: Page, problems: list[str]):
    with running_app(shared_server.url) as url:
        page.goto(url)
        upload(page, SAMPLES / "ferries.md")
        drop(page, SAMPLES / "harbour.md")
        expect(page.locator("#documents span")).to_have_text(["ferries.md", "harbour.md"])
        prefilled = re.fullmatch(r"harbour.md: 2 of 2 passages prefilled, (\d+) tokens computed", status(page))
        assert prefilled
        page.click("#prefill")
        expect(page.locator("#upload-status")).to_have_text(re.compile(r"4 of 4 passages prefilled, \d+ tokens"))
        assert number(status(page).split(",")[1]) < number(prefilled[1])
        assert not page.locator("#upload-error").is_visible()

        page.evaluate(WATCH)
        first = ask(page, HARBOUR)
        lengths = set(page.evaluate("seen"))
        assert 0 in lengths
        assert len(lengths) >= 3
        assert first["done"]["a3"]["reason"] is None
        assert first["done"]["a3"]["reused"] > 0
        check_card(page, first)
        # The full prefill found nothing, although the prompt is cached.
        assert first["full"]["a3"]["tail"] == first["full"]["prompt_tokens"] == first["done"]["prompt_tokens"]
        expect(page.locator(".times .full")).to_contain_text("times as long")

        second = ask(page, CARS)
        check_card(page, second)
        assert second["done"]["a3"]["reused"] > 0
        sources = [[one["text"] for one in sent["sources"]["sources"]] for sent in (first, second)]
        assert sources[0] != sources[1]
        assert set(sources[0]) & set(sources[1])

        with page.expect_response("**/ask") as response:
            page.locator("article").last.get_by_role("button", name="Ask again").click()
        again = events(page, response.value.text())
        check_card(page, again)
        assert again["sources"] == first["sources"]
        assert again["done"]["a3"]["continued"] > 0
        assert computed(again) < computed(first)
        asked = [again, second, first]
        expect(page.locator("h3")).to_have_text([HARBOUR, CARS, HARBOUR])
        shown = [number(text.split(" of ")[0]) for text in page.locator(".summary").all_inner_texts()]
        assert shown == [computed(sent) for sent in asked]
        assert problems == []

        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360

        nothing = ask(page, "Xylophone?")
        expect(page.locator("article .error").first).to_have_text(nothing["error"]["message"])
        long = ask(page, "ferry " + "\ua66e" * 1990)
        assert "context length" in long["error"]["message"]
        expect(page.locator("article .error").first).to_have_text(long["error"]["message"])
        page.uncheck("[name=compare]")
        after = ask(page, "What does a ticket to Norra cost?")
        check_card(page, after)
        assert "full" not in after
        assert problems == []


@pytest.mark.engine
def test_errors_are_shown_and_the_app_lives_on(page: Page, problems: list[str]):
    name = "<img src=x onerror=alert(1)> & 100%.md"
    with running_app(f"http://127.0.0.1:{free_port()}") as url:
        page.goto(url)
        error = page.locator("#upload-error")
        for file, content, message in (
            ("photo.png", b"\x89PNG\r\n\x1a\n\0\xff", "“photo.png” is not a text file"),
            ("blank.txt", b" \n\n ", "“blank.txt” is empty."),
            ("large.txt", b"a word " * 150_000, "“large.txt” is larger than 1 MB."),
        ):
            upload(page, {"name": file, "mimeType": "text/plain", "buffer": content})
            expect(error).to_contain_text(message)
            assert page.locator("#documents li").count() == 0
        assert len(problems) == 3
        assert all("the server responded with a status of" in problem for problem in problems)

        page.click("#paste summary")
        page.fill("#paste [name=name]", name)
        page.fill("#paste [name=text]", "<script>document.title = 'changed'</script> The heron & the owl.")
        page.click("#paste button")
        expect(error).to_contain_text("is not all prefilled")
        expect(page.locator("#documents span")).to_have_text([name])
        for _ in range(2):
            sent = ask(page, "Where is the heron?")
            expect(page.locator("article .error").first).to_contain_text("does not answer")
            assert sent["error"]["message"].startswith("The model server at")
        page.locator(".sources summary").first.click()
        expect(page.locator("figcaption").first).to_have_text(name)
        expect(page.locator("blockquote").first).to_contain_text("<script>")
        assert page.locator("main img, main script").count() == 0
        assert page.title() == "Ask your documents"
        page.get_by_role("button", name=f"Remove {name}").click()
        expect(page.locator("#documents li")).to_have_count(0)
        assert len(problems) == 3
    expect(page.locator("#ask button")).to_be_enabled()
    page.fill("#question", "Is anybody there?")
    page.press("#question", "Enter")
    expect(page.locator("article .error").first).to_have_text("The app does not answer. Is it still running?")
