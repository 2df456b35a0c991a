"""How a prompt's KV was obtained, and the report of it in ``meta_info["a3"]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

PARTS = ("prefix", "continued", "reused", "recomputed", "gap", "tail")
"""The sources of a prompt's KV; the counts of their tokens add up to the prompt. ``continued``: approximate KV that an
earlier request left for the same beginning of a prompt."""
TIMINGS_KEY = "a3_ms"
"""Key of ``meta_info`` with the times of the stages of a request's fusion, in milliseconds."""
ROUNDING = 64
"""Reported counts are multiples of this many tokens, unless exact ones are configured: an exact count reveals how much
of a guessed text is in another client's prompt (docs/security.md)."""


class Reason(StrEnum):
    """Why a request got a full prefill; the values of the report's ``reason``."""

    OFF = "off"
    DONOR = "donor"
    INVALID = "invalid options"
    LORA = "LoRA adapter"
    EMBEDDINGS = "input embeddings"
    MULTIMODAL = "multimodal"
    SESSION = "session"
    BEAM = "beam search"
    NOTHING = "nothing to reuse"
    TOO_LITTLE = "too little to reuse"
    RENEWAL = "renews donors"
    EVICTED = "donors evicted"
    NO_ROOM = "no room"
    ERROR = "error"
    DISABLED = "disabled after errors"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the KV of one request's prompt was obtained.

    Attributes:
        counts: tokens of each of :data:`PARTS`.
        charged: rows with freshly computed QKV, the probe's included, summed over layers, divided by layers x rows
            between prefix and tail.
        selector: its name.
        reason: why nothing was fused; None if something was.
        reusable: tokens that could have been reused; reported with :attr:`Reason.TOO_LITTLE`.
    """

    counts: tuple[int, ...]
    charged: float
    selector: str
    reason: Reason | None
    reusable: int

    @property
    def parts(self) -> dict[str, int]:
        """Number of tokens from each of :data:`PARTS`."""
        return dict(zip(PARTS, self.counts, strict=True))

    @property
    def why(self) -> str:
        """The reason for a full prefill; an empty text if there was none."""
        return str(self.reason) if self.result == "full" and self.reason is not None else ""

    @property
    def result(self) -> Literal["fused", "continued", "full"]:
        """Whether this request was fused, or only continues KV that an earlier one fused, or got a full prefill."""
        parts = self.parts
        if parts["reused"] + parts["recomputed"]:
            return "fused"
        return "continued" if parts["continued"] else "full"

    def report(self, exact: bool) -> dict[str, Any]:
        """The report for the client.

        Args:
            exact: report exact counts; otherwise multiples of :data:`ROUNDING`.
        """
        counts: Sequence[int] = self.counts
        charged, reusable = self.charged, self.reusable
        if not exact:
            counts, charged, reusable = _rounded(counts), round(charged, 2), _round(reusable)
        report: dict[str, Any] = dict(zip(PARTS, counts, strict=True))
        reason = None if self.reason is None else str(self.reason)
        report |= {"charged": round(charged, 6), "selector": self.selector, "reason": reason}
        if self.reason is Reason.TOO_LITTLE:
            report["reusable"] = reusable
        return report


def _rounded(counts: Sequence[int]) -> list[int]:
    """Round the boundaries between the parts, so that no part is negative and they add up to the prompt."""
    total, end, rounded = sum(counts), 0, [0]
    for count in counts[:-1]:
        end += count
        rounded.append(min(_round(end), total))
    return [after - before for before, after in zip(rounded, [*rounded[1:], total], strict=True)]


def _round(count: int) -> int:
    return (count + ROUNDING // 2) // ROUNDING * ROUNDING
