"""How far every selector's answers are from the full prefill's, measured on the real engine."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from a3_sglang.client import StartEngine, environment, flush, generate
from a3_sglang.config import AUTO
from a3_sglang.evaluation import metrics
from a3_sglang.evaluation.prompts import Case, Writer
from a3_sglang.evaluation.questions import Question
from a3_sglang.integration.dumps import ANSWER_KEY, LOGITS_VARIABLE
from a3_sglang.selectors import DenseLayers, Ratio, make_selector

ANSWER_TOKENS = 12
NOISE = "noise"
"""In place of a selector: the full prefill again, which differs from the reference by the engine's rounding only."""
IGNORES_RATIO: dict[str, Ratio] = {"full": 1.0, "reuse": 0.0}
"""Selectors that ignore the ratio, and the one that they are listed with."""

Variant = tuple[str, Ratio, str]
"""How a question is asked: selector, ratio, donor mode."""
Key = tuple[int, str, Ratio, str]
"""A question's number and a variant."""


@dataclass(frozen=True)
class Result:
    """One question asked in one variant.

    Attributes:
        question: its number.
        selector, ratio, donors: the variant.
        kl: mean KL divergence from the reference, in nats.
        agreement: share of tokens whose most likely next token is the reference's.
        f1, em: word overlap and exact match with the right answers; None if answers are not generated.
        charged: effective recompute ratio.
    """

    question: int
    selector: str
    ratio: Ratio
    donors: str
    kl: float
    agreement: float
    f1: float | None
    em: float | None
    charged: float

    @property
    def key(self) -> Key:
        return self.question, self.selector, self.ratio, self.donors


@dataclass(frozen=True)
class Experiment:
    """Questions to ask, and how.

    Attributes:
        questions: all questions; a prompt takes foreign passages from those after its own.
        numbers: indices of those that are asked.
        writer: of the prompts.
        tokenizer: of the model.
        depth: layers of the model.
        charged: ratios are charged budgets.
        answers: every variant also generates its own answer, for F1 and exact match.
        arguments: of the engines.
    """

    questions: Sequence[Question]
    numbers: range
    writer: Writer
    tokenizer: Any
    depth: int
    charged: bool
    answers: bool
    arguments: dict[str, Any]


class Evaluation:
    """Asks an engine one question at a time.

    Args:
        running: the engine.
        donors: its donor mode.
        folder: holds logits: the engine's dumps, and the references.
        experiment: what is asked.
    """

    def __init__(self, running: Any, donors: str, folder: Path, experiment: Experiment) -> None:
        self.running, self.donors, self.folder, self.experiment = running, donors, folder, experiment
        self.tokenizer = experiment.tokenizer
        self._reports: dict[str, dict[str, Any]] = {}
        """By selector, the report of this question at the least ratio, from which :meth:`_ratio` extrapolates."""

    def ask(self, variants: Sequence[Variant], done: Container[Key]) -> Iterator[Result]:
        """Ask all questions in these variants, which are of this engine's donor mode, except those that are done."""
        for number in self.experiment.numbers:
            if wanted := [variant for variant in variants if (number, *variant) not in done]:
                yield from self._results(number, wanted)

    def _results(self, number: int, wanted: list[Variant]) -> Iterator[Result]:
        """Ask one question in all wanted variants."""
        case = self.experiment.writer.case(self.experiment.questions, number)
        right = self.experiment.questions[number].answers
        noise = any(variant[0] == NOISE for variant in wanted)
        reference, teacher = self._reference(number, case.prompt, again=noise)

        def result(variant: Variant, option: Any) -> Result:
            logits, out = self._ask(case.prompt, option, teacher)
            report = out["meta_info"]["a3"]
            # `full` leaves exact KV, so the prompt may be a prefix by now, with nothing left to fuse.
            if option is not False and variant[0] != "full" and report["reason"] is not None:
                raise RuntimeError(f"fusion did not engage: {report}")
            agreement, answer = metrics.agreement(reference, logits), teacher
            if self.experiment.answers and agreement < 1:
                # Without the forced tokens, it would have answered differently.
                answer = self._ask(case.prompt, option, ANSWER_TOKENS)[1]["output_ids"]
            text = self._text(answer) if self.experiment.answers else None
            return Result(
                number,
                *variant,
                kl=metrics.divergence(reference, logits),
                agreement=agreement,
                f1=None if text is None else metrics.f1(text, right),
                em=None if text is None else metrics.exact_match(text, right),
                charged=report["charged"],
            )

        if noise:
            # The reference left the prompt in the tree, so this request computes little of it; if the case has earlier
            # requests, it computes what they do not leave there.
            if case.before:
                flush(self.running)
            for ids in case.before:
                generate(self.running, ids, a3=False)
            yield result((NOISE, 0.0, self.donors), False)
        self._reports.clear()
        if not case.before:
            self._donate(case)
        for variant in wanted:
            if variant[0] == NOISE:
                continue
            if case.before:
                self._donate(case)
            option = {"selector": variant[0], "ratio": self._ratio(case, variant), "keep": bool(case.before)}
            for ids in case.before:
                generate(self.running, ids, a3=option)
            yield result(variant, option)

    def _reference(self, number: int, prompt: list[int], again: bool) -> tuple[torch.Tensor, list[int]]:
        """Logits and tokens of a full prefill's answer, up to its end.

        Args:
            number: of the question.
            prompt: token ids.
            again: ask even if it is known, which leaves the prompt as the only one in the tree.
        """
        kept = self.folder / f"reference-{number}.pt"
        if again or not kept.exists():
            flush(self.running)
            logits, out = self._ask(prompt, False, ANSWER_TOKENS)
            tokens, eos = out["output_ids"], self.tokenizer.eos_token_id
            end = tokens.index(eos) + 1 if eos in tokens else len(tokens)
            torch.save((logits[:end].clone(), tokens[:end]), kept)
        reference: tuple[torch.Tensor, list[int]] = torch.load(kept)
        return reference

    def _donate(self, case: Case) -> None:
        """Empty the cache and fill it with the case's donors."""
        flush(self.running)
        for ids in case.donors[self.donors]:
            generate(self.running, ids, a3={"donor": True})

    def _ratio(self, case: Case, variant: Variant) -> Ratio:
        """Ratio to request; with ``charged``, the one at which the selector's charged budget is the variant's ratio."""
        selector, ratio, _ = variant
        if not self.experiment.charged or ratio == AUTO or selector in IGNORES_RATIO:
            return ratio
        if selector not in self._reports:
            out = generate(self.running, case.prompt, a3={"selector": selector, "ratio": 0.01, "keep": False})
            self._reports[selector] = out["meta_info"]["a3"]
        report = self._reports[selector]
        reused = report["reused"] + report["recomputed"]
        needs = make_selector(selector).needs
        dense = needs.count if isinstance(needs, DenseLayers) else 0
        row = (1 - dense / self.experiment.depth) / (reused + report["gap"])
        share = float(min(max((report["recomputed"] + (ratio - report["charged"]) / row) / reused, 0), 1))
        # Tokens that block matching leaves out count towards the ratio, so it has to be a little more than the share.
        ratio = share
        for _ in range(3):
            out = generate(self.running, case.prompt, a3={"selector": selector, "ratio": ratio, "keep": False})
            missing = share - out["meta_info"]["a3"]["recomputed"] / reused
            if abs(missing) * reused < 1:
                break
            ratio = min(max(ratio + missing, 0.0), 1.0)
        return ratio

    def _ask(self, ids: list[int], option: Any, answer: int | list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Ask for an answer of N tokens (an int), or force token ids (a list) as the answer.

        Returns:
            Logits, (tokens, vocabulary), and the engine's answer.
        """
        count = answer if isinstance(answer, int) else len(answer)
        out = generate(self.running, ids, count, option, custom_params={ANSWER_KEY: answer})
        path = self.folder / f"{out['meta_info']['id']}.pt"
        logits: torch.Tensor = torch.load(path)
        path.unlink()
        return logits, out

    def _text(self, ids: list[int]) -> str:
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


@contextmanager
def evaluating(experiment: Experiment, donors: str, start: StartEngine) -> Iterator[Evaluation]:
    """An engine of one donor mode, ready to be asked.

    Args:
        experiment: what is asked.
        donors: the donor mode.
        start: starts engines of the model.
    """
    options = {"A3_MIN_SAVING": "0", "A3_DONORS": donors, "A3_REPORT": "exact"}
    with (
        tempfile.TemporaryDirectory(prefix="a3-eval-") as folder,
        environment(**options, **{LOGITS_VARIABLE: folder}),
        start("a3", **experiment.arguments) as running,
    ):
        yield Evaluation(running, donors, Path(folder), experiment)


def run(
    experiment: Experiment, variants: Sequence[Variant], start: StartEngine, done: Container[Key]
) -> Iterator[Result]:
    """Ask all questions in all variants that are not done, on one engine per donor mode.

    Args:
        experiment: what is asked.
        variants: how each question is asked.
        start: starts engines of the model.
        done: keys of earlier results.
    """
    for mode in dict.fromkeys(donors for _, _, donors in variants):
        of_mode = [variant for variant in variants if variant[2] == mode]
        if any((number, *variant) not in done for number in experiment.numbers for variant in of_mode):
            with evaluating(experiment, mode, start) as evaluation:
                yield from evaluation.ask(of_mode, done)


def summary(variant: Variant, results: list[Result]) -> dict[str, Any]:
    """The table row of one variant: means over all questions."""
    row: dict[str, Any] = dict(zip(("selector", "ratio", "donors"), variant, strict=True))
    for name in ("kl", "agreement", "f1", "em", "charged"):
        values = [getattr(result, name) for result in results]
        row[name] = None if None in values else round(statistics.mean(values), 5)
    return row | {"n": len(results)}
