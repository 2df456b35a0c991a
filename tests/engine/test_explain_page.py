"""The command `a3-sglang explain` and its page, in a real browser."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from a3_sglang.cli.app import app
from a3_sglang.client import environment
from a3_sglang.explain.client import ExplainError
from a3_sglang.explain.page import screenshot
from a3_sglang.reporting.report import PARTS
from helpers.engines import OPTIONS as EXACT
from helpers.traffic import ODD, WORDS

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.engine

QUESTION = "Question: which word stands first?\nAnswer:"
HOSTILE = f"""A note for the browser: </script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">
<!-- <script> {ODD}"""
NAME = "prompt <img src=x onerror=window.hacked=3>.txt"


class Explained:
    """Files that the command wrote, and its prompt."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text
        self.page, self.picture = folder / "page.html", folder / "page.png"
        self.figures: dict[str, Any] = json.loads((folder / "figures.json").read_text())


@pytest.fixture(scope="module")
def shown(model: str, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    """The command, which starts a server, over documents of two donors."""
    folder = tmp_path_factory.mktemp("explain")
    documents = [" ".join(random.choices(WORDS[:12], k=70)) + "." for _ in range(4)]
    beginning = "Read the passages."
    texts = {
        "first.txt": "\n\n".join([beginning, *documents[:2]]),
        "second.txt": "\n\n".join([beginning, *documents[2:]]),
        NAME: "\n\n".join([beginning, documents[3], HOSTILE, documents[0]]),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    given = [argument for name in ("first.txt", "second.txt") for argument in ("--donor", str(folder / name))]
    wanted = [
        "-o",
        str(folder / "page.html"),
        "--png",
        str(folder / "page.png"),
        "--json",
        str(folder / "figures.json"),
    ]
    more = ["--model", model, "--dtype", os.environ["A3_TEST_DTYPE"], "--tokens", "12", "--repeats", "2"]
    with environment(**EXACT, PATH=f"{Path(os.environ['A3_TEST_BROWSER']).parent}:{os.environ['PATH']}"):
        done = CliRunner().invoke(
            app, ["explain", str(folder / NAME), *given, "--question", QUESTION, *wanted, *more, "--ratio", "0.3"]
        )
    assert done.exit_code == 0, done.output[-3000:]
    return Explained(folder, f"{texts[NAME]}\n\n{QUESTION}")


@pytest.fixture
def page(browser: Any, shown: Explained) -> Iterator[Page]:
    """The page. Console messages and network requests are errors."""
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(shown.page.as_uri())
    yield page
    assert said == []
    page.close()


def test_the_page_shows_the_prompt_as_it_is(page: Page, shown: Explained) -> None:
    assert page.locator("#prompt").evaluate("element => element.textContent") == shown.text
    assert page.locator("#name").text_content() == NAME
    assert page.evaluate("window.hacked") is None
    assert "hacked" not in page.title().replace(NAME, "")
    assert page.locator("#prompt img, #prompt script, h1 img").count() == 0


def test_the_legend_counts_what_the_report_counts(page: Page, shown: Explained) -> None:
    report = shown.figures["report"]
    assert report["reason"] is None
    assert min(report[part] for part in ("prefix", "reused", "recomputed", "gap", "tail")) > 0
    for part in PARTS:
        name = "exact" if part == "prefix" else part
        assert page.locator(f"#legend [data-part={name}] b").text_content() == str(report[part])
        tokens = page.locator(f"#prompt .run.{name} .t").count()
        assert tokens == report[part]
        assert page.locator(f"#parts tr.{name} .number").first.text_content() == str(report[part])


def test_the_legend_filters(page: Page) -> None:
    button = page.locator("#legend [data-part=recomputed]")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator("#prompt .run.recomputed.off").count() == 0
    assert page.locator("#prompt .run:not(.off)").count() == page.locator("#prompt .run.recomputed").count()
    # The arrow keys skip what is not shown.
    page.locator("#prompt [tabindex='0']").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        assert "recomputed" in page.evaluate("document.activeElement.className")
    button.click()
    assert page.locator("#prompt .off").count() == 0


def test_relevance_is_shown_as_heat(page: Page, shown: Explained) -> None:
    relevance = shown.figures["relevance"]
    known = [i for i, value in enumerate(relevance) if value is not None]
    hottest = max(known, key=lambda i: relevance[i])
    coldest = min(known, key=lambda i: relevance[i])
    colour = "element => getComputedStyle(element).backgroundColor"
    before = {i: page.locator(f"[data-i='{i}']").evaluate(colour) for i in (hottest, coldest)}
    assert before[hottest] == before[coldest]
    page.get_by_role("radio", name="Relevance").check()
    assert page.locator("body.relevance").count() == 1
    assert page.locator(f"[data-i='{hottest}']").evaluate(colour) != page.locator(f"[data-i='{coldest}']").evaluate(
        colour
    )
    assert page.locator("#prompt .unknown").count() == len(relevance) - len(known)
    assert page.locator("#scale").is_visible()
    page.locator(f"[data-i='{hottest}']").hover()
    assert "top" in (page.locator("#details").text_content() or "")


def test_the_keyboard_shows_where_kv_came_from(page: Page, shown: Explained) -> None:
    page.locator("#views input:checked").focus()
    while page.evaluate("document.activeElement.getAttribute('role')") != "option":
        page.keyboard.press("Tab")
    page.keyboard.press("Home")
    seen = []
    for _ in range(page.locator("#prompt .run").count()):
        seen.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert outline == "3px"
        page.keyboard.press("ArrowRight")
    assert len(set(seen)) == page.locator("#prompt .run").count()
    assert seen[0].startswith("exact, from position 0 of ")
    assert any(label.startswith("gap, computed for this prompt") for label in seen)
    page.keyboard.press("Home")
    origins = []
    for _ in range(20):
        origins.append(page.locator("#details dl").text_content() or "")
        before = page.evaluate("document.activeElement.getAttribute('aria-label')")
        page.keyboard.press("ArrowDown")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == before:
            break
    for name in ("first.txt", "second.txt"):
        assert any(f"from{name}" in text for text in origins)
    page.keyboard.press("ArrowUp")
    assert (page.locator("#details dl").text_content() or "") != origins[-1]


def test_every_token_comes_from_where_the_donor_has_it(shown: Explained, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.encode(shown.text)
    for origin in shown.figures["origins"]:
        donor = tokenizer.encode((shown.folder / origin["donor"]).read_text())
        length = origin["end"] - origin["start"]
        assert donor[origin["position"] : origin["position"] + length] == ids[origin["start"] : origin["end"]]


def test_both_answers_and_times_are_shown(page: Page, shown: Explained) -> None:
    figures = shown.figures
    texts = page.locator("#answers .said > div").all_text_contents()
    assert texts == ["".join(figures[way]["pieces"]) for way in ("a3", "full")]
    assert all(len(figures[way]["times"]) == 2 for way in ("a3", "full"))
    parted = figures["parted"]
    assert page.locator("#answers mark").count() == (0 if parted is None else 2)
    if parted is None:
        assert figures["a3"]["pieces"] == figures["full"]["pieces"]
    else:
        assert figures["a3"]["pieces"][:parted] == figures["full"]["pieces"][:parted]
        assert page.locator("#candidates tbody tr").count() == sum(map(len, figures["candidates"])) == 16
        for way, choices in zip(("a3", "full"), figures["candidates"], strict=True):
            taken = [choice for choice in choices if choice["taken"]]
            assert [choice["text"] for choice in taken] == [figures[way]["pieces"][parted]]
            # Others may be as likely.
            assert taken[0]["logprob"] == max(choice["logprob"] for choice in choices)
        assert page.locator("#candidates tr.taken").count() == 2


def test_dark_and_narrow(browser: Any, shown: Explained) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 844})
        page.goto(shown.page.as_uri())
        styles = "getComputedStyle(document.body)"
        colours[scheme] = page.evaluate(f"[{styles}.backgroundColor, {styles}.color]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.close()
    assert len({*colours["light"], *colours["dark"]}) == 4


def test_the_picture(shown: Explained) -> None:
    from PIL import Image

    with Image.open(shown.picture) as picture:
        assert picture.size == (1280, 1500)
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 20


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 cannot be reached"),
        (["--model", "x", "--ratio", "much"], "--ratio"),
        (["--model", "x", "--selector", "best"], "--selector"),
        (["--model", "x", "--png-size", "big"], "--png-size"),
        ([], "--model"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: list[str], named: str) -> None:
    (tmp_path / "prompt.txt").write_text("text")
    done = CliRunner().invoke(app, ["explain", str(tmp_path / "prompt.txt"), "-o", str(tmp_path / "page"), *arguments])
    assert done.exit_code != 0
    assert named in done.output
    assert "Traceback" not in done.output


def test_no_browser_is_a_clear_error(shown: Explained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExplainError, match="--png: no browser on the path; install Chromium"):
        screenshot(shown.page, tmp_path / "page.png", (800, 600))
