"""Measures the drift of copied KV on the real engine, to fit the model of ``a3_sglang.drift`` to a language model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from a3_sglang.client import StartEngine, environment, flush, generate
from a3_sglang.config import DONOR_MODES
from a3_sglang.drift.fit import SpanDrift
from a3_sglang.drift.model import MAX_BLOCK, Covariance
from a3_sglang.evaluation.prompts import Case
from a3_sglang.integration.dumps import DUMP_VARIABLE
from a3_sglang.rope import RopeTable, rotate

RATIO = 0.15
"""Share of the reused rows whose drift is observed."""
KINDS = ("keys", "values")


@dataclass(frozen=True)
class MeasuredSpan:
    """The drift of one span.

    Attributes:
        question: number of the question whose prompt it is in.
        donors: donor mode, ``harvest`` or ``compiled``.
        keys, values: moments of the drift, keys as they were before RoPE.
    """

    question: int
    donors: str
    keys: SpanDrift
    values: SpanDrift


def measure(
    start: StartEngine, case: Callable[[int], Case], numbers: Sequence[int], **arguments: Any
) -> Iterator[list[MeasuredSpan]]:
    """Measure the drift of every reused span on an engine, one list per question.

    Args:
        start: starts engines of the model.
        case: the prompts of a question, see :meth:`a3_sglang.evaluation.prompts.Writer.case`.
        numbers: of the questions.
        arguments: of the engine; a prompt has to fit into one step of its prefill.
    """
    options = {"A3_MIN_SAVING": "0", "A3_DONORS": "harvest", "A3_EXPLAIN": "on", "A3_DRIFT": "default"}
    with (
        tempfile.TemporaryDirectory(prefix="a3-calibrate-") as folder,
        environment(**options, **{DUMP_VARIABLE: folder}),
        start("a3", **arguments) as running,
    ):
        for number in numbers:
            yield measure_case(running, Path(folder), number, case(number))


def measure_case(running: Any, folder: Path, number: int, case: Case) -> list[MeasuredSpan]:
    """The drift of the spans of one prompt, with donors of both modes.

    The prompt is prefilled in full, with its spans copied only, and with some rows recomputed; the engine dumps the KV
    of all three. An engine with ``harvest`` does for both modes, as its tree holds nothing but the donors.

    Args:
        running: an engine with ``--a3-explain on``, which dumps KV.
        folder: where it does.
        number: of the question.
        case: the prompts.

    Raises:
        RuntimeError: the prompt was not fused.
    """

    def kv(ids: list[int], option: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        out = generate(running, ids, a3=option)
        report = out["meta_info"]["a3"]
        if option is not False and report["reason"] is not None:
            raise RuntimeError(f"fusion did not engage: {report}")
        file = folder / f"{out['meta_info']['id']}.pt"
        dumped: dict[str, Any] = torch.load(file)
        file.unlink()
        return dumped, report

    flush(running)
    fresh, _ = kv(case.prompt, False)
    spans = []
    for donors in DONOR_MODES:
        flush(running)
        for ids in case.donors[donors]:
            generate(running, ids, a3={"donor": True})
        for file in folder.iterdir():
            file.unlink()
        copied, report = kv(case.prompt, {"selector": "reuse", "keep": False, "explain": True})
        fused, _ = kv(case.prompt, {"selector": "probe", "ratio": RATIO, "keep": False})
        for span in report["detail"]["spans"]:
            first, last = span["start"], min(span["end"], span["start"] + MAX_BLOCK)
            recomputed = fused["recomputed"]
            observed = recomputed[(recomputed >= first) & (recomputed < last)].cpu()
            true, seen = (_drift(fresh, copied, torch.arange(first, last)), _drift(fused, copied, observed))
            moments = (SpanDrift.of(true[kind], observed - first, seen[kind]) for kind in KINDS)
            spans.append(MeasuredSpan(number, donors, *moments))
    return spans


def _drift(fresh: dict[str, Any], copied: dict[str, Any], positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fresh minus copied KV at some positions, float32 (layers, n, features); keys rotated to position 0.

    Layer 0 is left out, as its KV does not depend on the context.
    """
    keys, values = (fresh[part][1:, positions].float() - copied[part][1:, positions].float() for part in "kv")
    for layer, (cos_sin, neox) in enumerate(fresh["ropes"][1:]):
        rotation = RopeTable(cos_sin, neox).rotation(positions, torch.zeros_like(positions))
        keys[layer] = rotate(keys[layer], *rotation, neox)
    return {"keys": keys.flatten(2), "values": values.flatten(2)}


def left(spans: Sequence[SpanDrift], covariance: Covariance, seed: int | None = None) -> float:
    """Share of the drift of rows that are not observed that its prediction leaves; 1: it is of no use.

    Args:
        spans: the drift.
        covariance: predicts.
        seed: of a random draw of the observed rows, whose true drift predicts without damping; None: as in a fused
            prefill, from the drift that the recomputed rows showed, with damping.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    damping = covariance.damping if generator is None else 1.0
    error, total = [], []
    for span in spans:
        rows = len(span.drift)
        seen = None if generator is None else torch.randperm(rows, generator=generator)[: math.ceil(RATIO * rows)]
        gain, square = span.explained(covariance, seen)
        total.append(span.variance(seen))
        error.append(total[-1] - 2 * damping * gain + damping**2 * square)
    return math.fsum(error) / math.fsum(total)
