"""``a3-sglang verify``: the invariants of the design on a live engine of a given model."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from a3_sglang.cli.output import working
from a3_sglang.client import (
    DtypeOption,
    JsonOption,
    ModelOption,
    Prompts,
    VerboseOption,
    engine,
    environment,
    flush,
    generate,
    print_table,
    resolve_dtype,
    vocabulary_of,
    write_json,
)
from a3_sglang.integration.dumps import DUMP_VARIABLE
from a3_sglang.integration.support import RefusedError
from a3_sglang.reporting.report import PARTS

ANSWER = 8


class Verification:
    """The checks, each a method that returns what it measured or raises AssertionError.

    Args:
        running: the engine under test.
        stock: answers of a stock engine to :attr:`plain` prompts.
        folder: where the engine dumps KV.
        prompts: source of prompts.
        count: prompts of the ratio-1.0 check.
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
        """The error a bad option gives; empty where there is none."""
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

    def donor(self) -> None:
        """New chunks, left in the tree by an ordinary request."""
        flush(self.running)
        self.prompts.renew()
        self.ask(self.prompts.shuffled(), False)

    def full_prefill(self, count: int) -> str:
        """4: ratio 1.0 is a full prefill, in tokens, logprobs and KV."""
        worst = 0.0
        logprob = 0.0
        bits = 0
        for _ in range(count):
            self.donor()
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
            bits += worst == 0.0
        allowed = rounding(mine["k"].dtype)
        assert worst <= allowed, f"KV differs by {worst:.2e}, more than rounding ({allowed:.2e})"
        return f"{count} prompts, same tokens, KV within {worst:.1e}, logprobs within {logprob:.1e}"

    def layer_zero(self) -> str:
        """5: layer-0 KV of moved spans is fresh layer-0 KV."""
        self.donor()
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
        """2, 5: an exact prefix stays one, and a span at its donor's own place is one."""
        self.donor()
        first = self.prompts.shuffled()
        self.ask(first, False)
        again = first[: -self.prompts.question_tokens] + self.prompts.tokens(self.prompts.question_tokens)
        _, report = self.ask(again, True)
        shared = len(first) - self.prompts.question_tokens
        assert report["prefix"] >= shared - 64, report
        assert report["reused"] == report["recomputed"] == 0, report
        return f"{report['prefix']} of {shared} shared tokens came as a prefix"

    def request_only(self) -> str:
        """3: approximate KV is seen by requests that allow it alone; plain ones answer as on a stock engine."""
        self.donor()
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
            assert tokens(out) == tokens(expected), "a plain request answers otherwise than on a stock engine"
            assert logprob_difference(out, expected) == 0.0, "a plain request's logprobs differ from a stock engine's"
            self.ask(self.prompts.shuffled(), {"ratio": 0.15})
        return f"{len(self.plain)} plain requests among fused ones: tokens and logprobs of the stock engine"

    def namespaces(self) -> str:
        """6: another namespace is a miss."""
        self.donor()
        _, report = self.ask(self.prompts.shuffled(), True, extra_key="another tenant")
        assert report["reused"] == report["recomputed"] == report["prefix"] == 0, report
        return "another extra_key finds nothing"

    def no_leaks(self, count: int) -> str:
        """7: whatever happened, all slots come back."""
        chooser = random.Random(7)
        for _ in range(count):
            option = chooser.choice([False, True, {"ratio": 0.0}, {"ratio": 0.5}, {"selector": "reuse"}])
            self.ask(self.prompts.shuffled(), option)
        message = self.refused({"ratio": 2})
        assert "custom_params.a3.ratio" in message, message or "a ratio of 2 was accepted"
        flush(self.running)
        # When it is idle SGLang checks for leaked slots itself.
        time.sleep(2)
        self.ask(self.prompts.shuffled(), False)
        return f"{count} requests, a bad one, then everything flushed and SGLang's own leak check passed"


def verify(
    model: ModelOption,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the ratio-1.0 check.")] = 20,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a prompt before its question.")] = 640,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Check the invariants on a live engine of this model. Exit status 0 only where all hold."""
    source = Prompts(vocabulary_of(model), context, 4, seed)
    plain = [source.shuffled() for _ in range(4)]
    options: dict[str, Any] = {"chunked_prefill_size": 4 * context, "dtype": resolve_dtype(dtype)}
    with engine(model, None, **options) as running:
        stock = [answer(running, ids) for ids in plain]
        inert = "a3" not in stock[0]["meta_info"]
    rows: list[tuple[str, bool, str]] = [
        ("1: inert unless selected", inert, "a stock engine's answers carry no report")
    ]
    with (
        tempfile.TemporaryDirectory(prefix="a3-verify-") as folder,
        environment(**{DUMP_VARIABLE: folder, "A3_MIN_SAVING": "0", "A3_REPORT": "exact"}),
        engine(model, "a3", **options) as running,
    ):
        checks = Verification(running, stock, plain, Path(folder), source)
        wanted: list[Callable[[], str]] = [
            checks.exact_wins,
            checks.request_only,
            lambda: checks.full_prefill(prompts),
            checks.layer_zero,
            checks.namespaces,
            lambda: checks.no_leaks(20),
        ]
        names = (
            "2: exact wins",
            "3: approximate KV is optional",
            "4: ratio 1.0 is a full prefill",
            "5: moved spans",
            "6: namespaces",
            "7: no slot leaks",
        )
        for name, check in zip(names, wanted, strict=True):
            with working(f"checking {name}"):
                try:
                    rows.append((name, True, check()))
                except AssertionError as error:
                    rows.append((name, False, str(error)))
        rows.append(("fusion engaged", checks.fused > 0, f"{checks.fused} requests were fused"))
    rows.append(("8: refused at start", *_refusal(model)))
    print_table(f"a3-sglang verify {model}", ("invariant", "", "measured"), [(n, mark(ok), t) for n, ok, t in rows])
    write_json(json, [{"check": n, "ok": ok, "measured": t} for n, ok, t in rows])
    if not all(ok for _, ok, _ in rows):
        raise typer.Exit(1)


def _refusal(model: str) -> tuple[bool, str]:
    """8: a configuration that cannot be served is refused before anything is loaded."""
    try:
        with engine(model, "a3", disable_radix_cache=True):
            return False, "an engine without a radix cache started"
    except RefusedError as error:
        return True, str(error)


def answer(running: Any, ids: list[int], a3: Any = None, **more: Any) -> dict[str, Any]:
    return generate(running, ids, ANSWER, a3, return_logprob=True, **more)


def tokens(out: dict[str, Any]) -> list[int]:
    return list(out["output_ids"])


def logprob_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    pairs = zip(a["meta_info"]["output_token_logprobs"], b["meta_info"]["output_token_logprobs"], strict=True)
    differences = [abs(x[0] - y[0]) for x, y in pairs]
    return max(differences) if all(math.isfinite(difference) for difference in differences) else math.inf


def _worst_row(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a head's vector."""
    a, b = found.float(), expected.float()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def rounding(dtype: torch.dtype) -> float:
    """Relative error of what was added up in another order: float32 sums in its own precision."""
    return torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)


def mark(ok: bool) -> str:
    return "holds" if ok else "BROKEN"
