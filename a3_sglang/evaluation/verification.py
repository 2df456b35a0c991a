"""The invariants of ``docs/architecture.md``, checked on running engines of a given model."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from a3_sglang.client import Progress, Prompts, StartEngine, environment, flush, generate
from a3_sglang.integration.dumps import DUMP_VARIABLE
from a3_sglang.integration.support import RefusedError
from a3_sglang.reporting.report import PARTS

ANSWER_TOKENS = 8


class Check(NamedTuple):
    """Outcome of one check.

    Attributes:
        name: the invariant, with its number.
        ok: whether it holds.
        measured: what was measured, or how it is violated.
    """

    name: str
    ok: bool
    measured: str


def verify(start: StartEngine, prompts: Prompts, count: int, progress: Progress, **arguments: Any) -> Iterator[Check]:
    """Start a stock engine, then one with a3, and check all invariants.

    Args:
        start: starts engines of the model.
        prompts: source of prompts.
        count: prompts of the ratio-1.0 check.
        progress: shows each check.
        arguments: of both engines.
    """
    plain = [prompts.shuffled() for _ in range(4)]
    with start(None, **arguments) as running:
        stock = [answer(running, ids) for ids in plain]
        inert = "a3" not in stock[0]["meta_info"]
    yield Check("1: inert unless selected", inert, "a stock engine's answers carry no report")
    with (
        tempfile.TemporaryDirectory(prefix="a3-verify-") as folder,
        environment(**{DUMP_VARIABLE: folder, "A3_MIN_SAVING": "0", "A3_REPORT": "exact"}),
        start("a3", **arguments) as running,
    ):
        checks = Verification(running, stock, plain, Path(folder), prompts)
        named: dict[str, Callable[[], str]] = {
            "2: exact wins": checks.exact_wins,
            "3: approximate KV is optional": checks.request_only,
            "4: ratio 1.0 is a full prefill": lambda: checks.full_prefill(count),
            "5: moved spans": checks.layer_zero,
            "6: namespaces": checks.namespaces,
            "7: no slot leaks": lambda: checks.no_leaks(20),
        }
        for name, check in named.items():
            with progress(f"checking {name}"):
                try:
                    outcome = Check(name, True, check())
                except AssertionError as error:
                    outcome = Check(name, False, str(error))
            yield outcome
        yield Check("fusion engaged", checks.fused > 0, f"{checks.fused} requests were fused")
    yield _refusal(start)


def _refusal(start: StartEngine) -> Check:
    """8: a configuration that cannot be served is refused before anything is loaded."""
    name = "8: refused at start"
    try:
        with start("a3", disable_radix_cache=True):
            return Check(name, False, "an engine without a radix cache started")
    except RefusedError as error:
        return Check(name, True, str(error))


class Verification:
    """The checks, each a method that returns what it measured or raises AssertionError.

    Args:
        running: the engine under test, with a3.
        stock: answers of a stock engine to the ``plain`` prompts.
        plain: prompts that are asked with fusion off.
        folder: the engine dumps KV into it.
        prompts: source of prompts.
    """

    def __init__(self, running: Any, stock: list[Any], plain: list[list[int]], folder: Path, prompts: Prompts) -> None:
        self.running, self.stock, self.plain, self.folder, self.prompts = running, stock, plain, folder, prompts
        self.fused = 0

    def ask(self, ids: list[int], a3: Any, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        out = answer(self.running, ids, a3, **more)
        report = out["meta_info"]["a3"]
        parts = sum(report[key] for key in PARTS)
        assert parts == len(ids), f"the report's parts add up to {parts} of {len(ids)} tokens: {report}"
        self.fused += report["reason"] is None
        return out, report

    def refused(self, a3: Any) -> str:
        """The error that bad options cause; empty if they are accepted."""
        try:
            self.ask(self.prompts.shuffled(), a3)
        except ValueError as error:
            return str(error)
        return ""

    def kv(self, out: dict[str, Any]) -> dict[str, torch.Tensor]:
        path = self.folder / f"{out['meta_info']['id']}.pt"
        kv: dict[str, torch.Tensor] = torch.load(path)
        path.unlink()
        return kv

    def renew_donor(self) -> None:
        """Empty the cache and have an ordinary request leave new chunks in it."""
        flush(self.running)
        self.prompts.renew()
        self.ask(self.prompts.shuffled(), False)

    def full_prefill(self, count: int) -> str:
        """4: ratio 1.0 is a full prefill, in tokens, logprobs and KV."""
        worst = 0.0
        logprob = 0.0
        for _ in range(count):
            self.renew_donor()
            ids = self.prompts.shuffled()
            fused, report = self.ask(ids, {"ratio": 1.0, "selector": "probe", "keep": False})
            assert report["reason"] is None, report
            assert report["reused"] == 0, report
            assert report["recomputed"] > 0, report
            mine = self.kv(fused)
            full, other = self.ask(ids, False)
            assert other["prefix"] == report["prefix"], f"what was fused is a prefix now: {other}"
            theirs = self.kv(full)
            assert tokens(fused) == tokens(full), f"greedy tokens differ: {tokens(fused)}, {tokens(full)}"
            logprob = max(logprob, logprob_difference(fused, full))
            end = report["prefix"] + report["recomputed"] + report["gap"]
            for part in ("k", "v"):
                a, b = mine[part][:, :end].float(), theirs[part][:, :end].float()
                error = float((a - b).norm() / b.norm())
                assert error == error, "NaN in the KV"
                worst = max(worst, error)
        allowed = rounding(mine["k"].dtype)
        assert worst <= allowed, f"KV differs by {worst:.2e}, more than rounding ({allowed:.2e})"
        return f"{count} prompts, same tokens, KV within {worst:.1e}, logprobs within {logprob:.1e}"

    def layer_zero(self) -> str:
        """5: layer-0 KV of moved spans is fresh layer-0 KV."""
        self.renew_donor()
        ids = self.prompts.shuffled()
        fused, report = self.ask(ids, {"selector": "reuse"})
        assert report["reason"] is None, report
        mine = self.kv(fused)
        full, _ = self.ask(ids, False)
        theirs = self.kv(full)
        end = report["prefix"] + report["reused"] + report["gap"]
        error = _worst_row(mine["v"][0, :end], theirs["v"][0, :end])
        assert error <= rounding(mine["v"].dtype), f"layer-0 values of moved spans differ by {error:.2e}"
        error = _worst_row(mine["k"][0, :end], theirs["k"][0, :end])
        assert error <= 4 * rounding(mine["k"].dtype), f"layer-0 keys of moved spans differ by {error:.2e}"
        return f"values within rounding, keys within {error:.1e} (rounding of two rotations)"

    def exact_wins(self) -> str:
        """2, 5: an exact prefix is used as such, and so is a span at its donor's own position."""
        self.renew_donor()
        first = self.prompts.shuffled()
        self.ask(first, False)
        again = first[: -self.prompts.question_tokens] + self.prompts.tokens(self.prompts.question_tokens)
        _, report = self.ask(again, True)
        shared = len(first) - self.prompts.question_tokens
        assert report["prefix"] >= shared - 64, report
        assert report["reused"] == report["recomputed"] == 0, report
        return f"{report['prefix']} of {shared} shared tokens came as a prefix"

    def request_only(self) -> str:
        """3: only requests that allow approximate KV see it; plain ones answer as on a stock engine."""
        self.renew_donor()
        ids = self.prompts.shuffled()
        _, first = self.ask(ids, {"ratio": 0.15})
        _, again = self.ask(ids, {"ratio": 0.15})
        _, other = self.ask(ids, False)
        assert first["reason"] is None, first
        assert again["continued"] > 0, f"the same prompt again did not continue: {again}"
        assert other["prefix"] == first["prefix"], f"a plain request saw approximate KV: {first}, {other}"
        assert other["continued"] == 0, other
        flush(self.running)
        for ids, expected in zip(self.plain, self.stock, strict=True):
            out, _ = self.ask(ids, False)
            assert tokens(out) == tokens(expected), "a plain request's tokens differ from a stock engine's"
            assert logprob_difference(out, expected) == 0.0, "a plain request's logprobs differ from a stock engine's"
            self.ask(self.prompts.shuffled(), {"ratio": 0.15})
        return f"{len(self.plain)} plain requests among fused ones: tokens and logprobs of the stock engine"

    def namespaces(self) -> str:
        """6: another namespace is a miss."""
        self.renew_donor()
        _, report = self.ask(self.prompts.shuffled(), True, extra_key="another tenant")
        assert report["reused"] == report["recomputed"] == report["prefix"] == 0, report
        return "another extra_key finds nothing"

    def no_leaks(self, count: int) -> str:
        """7: all slots are freed, whatever was asked."""
        chooser = random.Random(7)
        for _ in range(count):
            option = chooser.choice([False, True, {"ratio": 0.0}, {"ratio": 0.5}, {"selector": "reuse"}])
            self.ask(self.prompts.shuffled(), option)
        message = self.refused({"ratio": 2})
        assert "custom_params.a3.ratio" in message, message or "a ratio of 2 was accepted"
        flush(self.running)
        # An idle SGLang checks for leaked slots itself.
        time.sleep(2)
        self.ask(self.prompts.shuffled(), False)
        return f"{count} requests, a bad one, then everything flushed and SGLang's own leak check passed"


def answer(running: Any, ids: list[int], a3: Any = None, **more: Any) -> dict[str, Any]:
    return generate(running, ids, ANSWER_TOKENS, a3, return_logprob=True, **more)


def tokens(out: dict[str, Any]) -> list[int]:
    """Token ids of the answer."""
    return list(out["output_ids"])


def logprob_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest difference of the logprobs of two equally long answers; infinite if one is not finite."""
    pairs = zip(a["meta_info"]["output_token_logprobs"], b["meta_info"]["output_token_logprobs"], strict=True)
    differences = [abs(x[0] - y[0]) for x, y in pairs]
    return max(differences) if all(math.isfinite(difference) for difference in differences) else math.inf


def _worst_row(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error of a (..., head_dim) tensor's vectors."""
    a, b = found.float(), expected.float()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def rounding(dtype: torch.dtype) -> float:
    """Relative error of sums in another order: float32 accumulates in its own precision, others in float32."""
    return torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)
