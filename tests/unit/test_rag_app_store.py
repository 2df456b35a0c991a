"""Passages and search of the example app."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "rag_app"


def load_store() -> Any:
    spec = importlib.util.spec_from_file_location("rag_app_store", FOLDER / "store.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


store = load_store()


def words(text: str) -> list[str]:
    return text.split()


def test_passages_hold_all_words_in_order_and_are_cut_at_blank_lines():
    paragraphs = [f"Paragraph {i} speaks of {'many ' * (7 * i % 60)}things." for i in range(80)]
    passages = store.cut("\r\n\r\n".join(paragraphs))
    assert words(" ".join(passages)) == words(" ".join(paragraphs))
    assert all(len(passage) <= store.LONGEST for passage in passages)
    for passage, following in itertools.pairwise(passages):
        assert set(passage.split("\n\n")) <= set(paragraphs)
        assert len(passage) + len("\n\n") + len(following.split("\n\n")[0]) > store.LONGEST


def test_a_heading_begins_a_passage():
    section = "One sentence of a section.\n\n" * 30
    passages = store.cut("".join(f"# Section {i}\n\n{section}" for i in range(4)))
    assert [passage.split("\n")[0] for passage in passages] == [f"# Section {i}" for i in range(4)]


@pytest.mark.parametrize(
    ("unit", "end"), [("A sentence has five words. ", "."), ("word ", "d"), ("字", "字"), ("これは文です。", "。")]
)
def test_a_long_paragraph_is_cut_at_sentences_or_words(unit: str, end: str):
    text = unit * 1000
    passages = store.cut(text)
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(len(passage) <= store.LONGEST and passage.endswith(end) for passage in passages)
    assert all(len(passage) > store.LONGEST - 30 for passage in passages[:-1])


@pytest.mark.parametrize("text", ["", "  \n\n \t\n", "\r\n\r\n"])
def test_nothing_is_cut_into_nothing(text: str):
    assert store.cut(text) == []


@pytest.fixture
def animals() -> Any:
    animals = store.Store()
    animals.add("birds", ["The heron catches fish at dawn.", "Swallows leave in autumn: they fly south."])
    animals.add("misc", ["A café by the old harbour sells ferry tickets.", "日本語 の テキスト"])
    return animals


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("What does a heron catch?", "The heron"),
        ("who is CATCHING fishes", "The heron"),
        ('Is it "harbour" or harbor?', "A café"),
        ("cafe", "A café"),
        ("tickets AND NOT (NEAR ferry)", "A café"),
        ("col:tickets* ^ferry -{x}", "A café"),
        ("swallows' autumn; DROP TABLE passages --", "Swallows"),
        ("テキスト?", "日本語"),
    ],
)
def test_a_question_finds_the_passage_that_shares_its_words(animals: Any, question: str, found: str):
    assert animals.search(question, 3)[0].text.startswith(found)


@pytest.mark.parametrize(
    "question",
    [
        "",
        "   ",
        '"',
        '"""',
        "*",
        "(((",
        ")",
        "AND",
        "OR NOT",
        "NEAR(",
        "'",
        "^",
        ":",
        "{x y}:",
        "_ __",
        "\0",
        "\ud800",
        "🙂",
    ],
)
def test_a_question_that_shares_no_word_finds_nothing(animals: Any, question: str):
    assert animals.search(question, 3) == []


def test_a_question_may_have_thousands_of_words(animals: Any):
    question = " ".join(f"word{i}" for i in range(5000)) + " heron"
    assert [passage.document for passage in animals.search(question, 3)] == ["birds"]


def test_the_best_passage_comes_first_and_no_more_than_asked_for():
    texts = [f"The lamp number {i} stands in a room." for i in range(9)] + ["The lamp and the lens: a lens for a lamp."]
    many = store.Store()
    many.add("lamps", texts)
    found = many.search("Which lamp has a lens?", 4)
    assert len(found) == 4
    assert found[0].text == texts[-1]


def test_a_document_is_replaced_and_removed(animals: Any, tmp_path: Path):
    assert animals.documents() == [("birds", 2), ("misc", 2)]
    animals.add("birds", ["Only owls are left."])
    assert animals.search("heron", 3) == []
    animals.remove("misc")
    assert animals.documents() == [("birds", 1)]
    assert [passage.text for passage in animals.passages()] == ["Only owls are left."]
    file = str(tmp_path / "kept.sqlite3")
    store.Store(file).add("kept", ["A text that stays."])
    assert store.Store(file).documents() == [("kept", 1)]
