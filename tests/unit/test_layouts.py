"""Files of questions in the layouts of this package, LongBench, RULER and QCFuse; these are written here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from a3_sglang.evaluation.layouts import load, split_text
from a3_sglang.evaluation.prompts import Writer

WORDS = ("river", "mill", "brass", "Käse", "quarrel", "of", "the", "seven", "lamps", "42", "naïve", "umbrella")


def prose(seed: int, lines: int) -> str:
    chooser = random.Random(seed)
    return "\n".join(" ".join(chooser.choices(WORDS, k=chooser.randint(1, 60))) + "." for _ in range(lines))


def lines_of(text: str) -> list[str]:
    return text.split("\n")


def write(path: Path, records: list[Any], jsonl: bool) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n" if jsonl else json.dumps(records))
    return path


LONGBENCH = {
    "input": "Who keeps the lamps?",
    "context": "Passage 1:\nThe lamps are kept by Ada.\n\nPassage 2:\nThe mill is old.",
    "answers": ["Ada", "Ada the miller"],
    "length": 14,
    "dataset": "hotpotqa_e",
    "language": "en",
    "all_classes": None,
    "_id": "0f",
}
QCFUSE = {
    "input": "who keeps the lamps?",
    "context": ["The mill is old.", " ", "Ada has the lamps."],
    "answers": ["Ada"],
}
NIAH = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\nThe mill is old. One of the special magic numbers for lamps is: 71.\nThe river is wide. "
    "One of the special magic numbers for lamps is: 23.\n"
    "What are all the special magic numbers for lamps mentioned in the provided text?"
)
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\nVAR ABC = 1\n"
    "Question: Find all variables that are assigned the value 1 in the text above. Answer: ABC\n\n"
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "The mill is old. VAR LAMPS = 5\nThe river is wide. VAR BRASS = VAR LAMPS\n"
    "Question: Find all variables that are assigned the value 5 in the text above."
)
QA = (
    "Answer the question based on the given documents.\n\nThe following are given documents.\n\nDocument 1:\nAda keeps "
    "the lamps.\n\nDocument 2:\nThe mill is old.\n\nAnswer the question based on the given documents.\n\n"
    "Question: Who keeps the lamps?"
)


@pytest.mark.parametrize("jsonl", [True, False])
def test_own_layout(tmp_path: Path, jsonl: bool):
    record = {"ctxs": [{"title": "Mill", "text": "It is old."}, {"text": "b"}], "question": "Old?", "answers": ["yes"]}
    (question,) = load(write(tmp_path / "q", [record], jsonl), lines_of)
    assert [(ctx.title, ctx.text) for ctx in question.ctxs] == [("Mill", "It is old."), ("", "b")]
    assert (question.question, question.answers, question.in_order) == ("Old?", ("yes",), False)


@pytest.mark.parametrize("jsonl", [True, False])
def test_longbench_is_cut_into_passages(tmp_path: Path, jsonl: bool):
    report = LONGBENCH | {"input": "", "dataset": "gov_report_e", "answers": ["Lamps are kept."]}
    questions = load(write(tmp_path / "q", [LONGBENCH, report], jsonl), lines_of)
    assert [ctx.text for ctx in questions[0].ctxs] == [
        "Passage 1:",
        "The lamps are kept by Ada.",
        "Passage 2:",
        "The mill is old.",
    ]
    assert (questions[0].question, questions[0].answers) == ("Who keeps the lamps?", ("Ada", "Ada the miller"))
    assert questions[1].question == "Summarize the report."
    assert all(question.in_order for question in questions)


def test_qcfuse_has_its_own_passages(tmp_path: Path):
    (question,) = load(write(tmp_path / "q", [QCFUSE | {"num_chunks": 3}], True), lines_of)
    assert [ctx.text for ctx in question.ctxs] == ["The mill is old.", "Ada has the lamps."]
    assert (question.question, question.answers, question.in_order) == ("who keeps the lamps?", ("Ada",), True)


@pytest.mark.parametrize(
    ("text", "prefix", "outputs", "asked", "answers"),
    [
        (
            NIAH,
            " The special magic numbers for lamps mentioned in the provided text are",
            ["71", "23"],
            "What are all the special magic numbers for lamps mentioned in the provided text?",
            ("71, 23",),
        ),
        (
            TRACKING,
            " Answer: According to the chain(s) of variable assignment in the text above, 2 variables are assigned the "
            "value 5, they are: ",
            ["LAMPS", "BRASS"],
            "Find all variables that are assigned the value 5 in the text above.",
            ("LAMPS, BRASS",),
        ),
        (QA, " Answer:", ["Ada", "Ada the miller"], "Who keeps the lamps?", ("Ada", "Ada the miller")),
    ],
)
def test_ruler_asks_in_its_last_line(
    tmp_path: Path, text: str, prefix: str, outputs: list[str], asked: str, answers: tuple[str, ...]
):
    """Some versions keep the beginning of the answer in a separate field, others append it to the question."""
    records = [
        {"index": 0, "input": text, "outputs": outputs, "length": 90, "answer_prefix": prefix},
        {"index": 1, "input": text + prefix, "outputs": outputs, "length": 90},
    ]
    for question in load(write(tmp_path / "q", records, True), lines_of):
        assert (question.question, question.answers, question.in_order) == (asked, answers, True)
        kept = "\n".join(ctx.text for ctx in question.ctxs)
        assert kept == "\n".join(line for line in text.split("\n")[:-1] if line)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"passages": [], "q": 1}, "question 1: has none of the fields ctxs .* it has passages, q$"),
        ([1], "question 1: has none of the fields .* it has no fields$"),
        ({key: value for key, value in LONGBENCH.items() if key != "answers"}, "question 1: answers: Field required"),
        (LONGBENCH | {"context": 3}, "question 1: context: Input should be a valid string"),
        (LONGBENCH | {"context": " \n "}, "question 1: ctxs: "),
        (LONGBENCH | {"input": ""}, "question 1: input: is empty, and the dataset 'hotpotqa_e'"),
        (QCFUSE | {"context": []}, "question 1: context: "),
        (QCFUSE | {"context": ["a", 5]}, r"question 1: context\.1: "),
        ({"input": "one line", "outputs": ["a"]}, "question 1: input: is one line"),
        ({"input": NIAH, "outputs": []}, "question 1: outputs: "),
        ({"input": 5, "outputs": ["a"]}, "question 1: input: Input should be a valid string"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, record: Any, message: str):
    path = write(tmp_path / "data.jsonl", [LONGBENCH, record], True)
    with pytest.raises(ValueError, match=message) as error:
        load(path, lines_of)
    assert str(error.value).startswith(f"--data {path}: ")
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), lines=st.integers(0, 40), tokens=st.integers(64, 300))
def test_a_text_is_cut_without_loss(model: str, seed: int, lines: int, tokens: int):
    """All words in order, no passage too long, and cuts at the ends of lines if there is one in the second half."""
    tokenizer, text = AutoTokenizer.from_pretrained(model), prose(seed, lines)
    passages = split_text(text, tokenizer, tokens)
    assert " ".join(passages).split() == text.split()
    for passage in passages:
        assert len(tokenizer(passage, add_special_tokens=False).input_ids) <= tokens
    whole = set(text.split("\n"))
    for passage in passages[:-1]:
        last = passage.split("\n")[-1]
        assert last in whole or len(last) > 0.4 * len(passage)


def test_a_text_without_spaces_is_cut_anywhere(model: str):
    tokenizer = AutoTokenizer.from_pretrained(model)
    passages = split_text("lamps" * 300, tokenizer, 64)
    assert "".join(passages) == "lamps" * 300
    assert len(passages) > 2


def test_passages_of_a_text_keep_their_order_in_the_prompt(model: str, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [f"Page {i}: " + prose(i, 3) for i in range(12)]
    records = [QCFUSE | {"context": texts[i:] + texts[:i]} for i in range(3)]
    questions = load(write(tmp_path / "q", records, True), lines_of)
    for seed in range(5):
        for number, record in enumerate(records):
            case = Writer(tokenizer, 5, 64, seed).case(questions, number)
            prompt, (donor,) = tokenizer.decode(case.prompt), case.donors["harvest"]
            found = [prompt.find(text.split(":")[0] + ":") for text in record["context"]]
            kept = [place for place in found if place >= 0]
            assert len(kept) == 5
            assert kept == sorted(kept)
            assert donor[: len(case.donors["compiled"][0])] != case.donors["compiled"][0]


def test_passages_that_are_all_the_same_are_refused(model: str, tmp_path: Path):
    questions = load(write(tmp_path / "q", [QCFUSE | {"context": ["same", "same"]}], True), lines_of)
    with pytest.raises(ValueError, match="question 0: all passages are the same text"):
        Writer(AutoTokenizer.from_pretrained(model), 5, 64, 0).case(questions, 0)
