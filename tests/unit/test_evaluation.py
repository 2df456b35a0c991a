"""Questions, prompts, metrics and variants of the evaluation."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from a3_sglang.cli.evaluate import parse_variants
from a3_sglang.evaluation import metrics
from a3_sglang.evaluation.layouts import load
from a3_sglang.evaluation.prompts import Writer
from a3_sglang.evaluation.questions import TASKS, make
from a3_sglang.evaluation.runner import NOISE


@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 1 << 30))
def test_divergence_is_the_definition(tokens: int, vocabulary: int, seed: int):
    p, q = torch.randn(2, tokens, vocabulary, generator=torch.Generator().manual_seed(seed))
    a, b = (x.double().exp() / x.double().exp().sum(-1, keepdim=True) for x in (p, q))
    expected = sum(float(x * math.log(x / y)) for x, y in zip(a.flatten(), b.flatten(), strict=True)) / tokens
    assert metrics.divergence(p, q) == pytest.approx(expected, abs=1e-6)
    assert metrics.divergence(p, p + 3) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence_refuses_what_is_not_finite(bad: float):
    broken = torch.zeros(2, 3)
    broken[1, 1] = bad
    with pytest.raises(FloatingPointError):
        metrics.divergence(torch.zeros(2, 3), broken)
    with pytest.raises(FloatingPointError):
        metrics.divergence(broken, torch.zeros(2, 3))


def test_agreement_counts_equal_first_choices():
    mine, theirs = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    assert metrics.agreement(mine, theirs) == 0.5


@pytest.mark.parametrize(
    ("answer", "right", "f1", "em"),
    [
        ("The Exeter College.", ["exeter college"], 1.0, 1.0),
        ("He went to Exeter College", ["exeter college"], 4 / 7, 0.0),
        ("Oxford", ["exeter college", "Oxford"], 1.0, 1.0),
        ("", ["Oxford"], 0.0, 0.0),
        ("Cambridge", ["Oxford"], 0.0, 0.0),
    ],
)
def test_words_are_compared_without_case_articles_and_punctuation(answer, right, f1, em):
    assert metrics.f1(answer, right) == pytest.approx(f1)
    assert metrics.exact_match(answer, right) == em


def test_more_passages_than_there_are_texts_are_refused():
    with pytest.raises(ValueError, match=r"at most \d+ passages, not 1000"):
        make("facts", 1, 1000, 10, 0)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_hold_their_answers_and_repeat_with_their_seed(task: str):
    questions = make(task, 6, 5, 12, seed=3)
    assert questions == make(task, 6, 5, 12, seed=3)
    assert questions != make(task, 6, 5, 12, seed=4)
    for question in questions:
        text = " ".join(ctx.text for ctx in question.ctxs)
        assert len(question.ctxs) == 5
        assert all(part in text for part in question.answers[0].split(" and "))
        assert question.answers[0] not in question.question


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no questions"),
        ("{", "question 0: "),
        ('[{"ctxs"', "question 0: "),
        ('[{"ctxs": [], "question": "q", "answers": ["a"]}]', "question 0: ctxs: "),
        ('[{"ctxs": [{"text": "t"}], "question": "q"}]', "question 0: answers: "),
    ],
)
def test_bad_data_is_named(tmp_path, content: str, message: str):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load(path, str.splitlines)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        load(tmp_path / "none.json", str.splitlines)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("nope", "0.1", "harvest"), "--selectors"),
        (("probe", "1.5", "harvest"), "--ratios"),
        (("probe", "x", "harvest"), "--ratios"),
        (("probe", "0.1", "sown"), "--donors"),
    ],
)
def test_bad_variants_are_named(arguments, hint):
    with pytest.raises(typer.BadParameter) as error:
        parse_variants(*arguments)
    assert error.value.param_hint == hint


def test_variants_start_with_the_references_and_ask_rules_that_ignore_the_ratio_once():
    variants = parse_variants("probe,reuse,full", "0.05,0.15", "compiled")
    assert variants == [
        (NOISE, 0.0, "compiled"),
        ("full", 1.0, "compiled"),
        ("probe", 0.05, "compiled"),
        ("probe", 0.15, "compiled"),
        ("reuse", 0.0, "compiled"),
    ]


def test_auto_is_asked_of_rules_that_measure_attention():
    variants = parse_variants("probe,a3,epic", "auto,0.1", "harvest")
    assert [variant[:2] for variant in variants[2:]] == [
        ("probe", "auto"),
        ("probe", 0.1),
        ("a3", "auto"),
        ("a3", 0.1),
        ("epic", 0.1),
    ]


def test_passages_are_the_same_tokens_in_prompt_and_donors(model: str):
    writer = Writer(AutoTokenizer.from_pretrained(model), passages=3, passage_tokens=100, seed=1)
    questions = make("facts", 3, 4, 12, seed=0)
    for number in range(3):
        case = writer.case(questions, number)
        compiled = case.donors["compiled"]
        shared = max(i for i in range(len(compiled[0])) if compiled[0][:i] == compiled[1][:i])
        begin = compiled[0][: len(writer.ids(writer._before))]
        assert shared >= len(begin)
        chunks = [donor[len(begin) :] for donor in compiled]
        assert case.prompt[: len(begin) + sum(map(len, chunks))] == [*begin, *chain(*chunks)]
        (harvest,) = case.donors["harvest"]
        assert harvest[: len(begin) + len(chunks[0])] != begin + chunks[0]
        text = " ".join(map(str, harvest))
        assert all(" ".join(map(str, chunk)) in text for chunk in chunks)
