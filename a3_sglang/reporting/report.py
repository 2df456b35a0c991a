"""What became of a prompt, and the report of it that its request carries in ``meta_info["a3"]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from a3_sglang.integration.request_state import Reason

PARTS = ("prefix", "continued", "reused", "recomputed", "gap", "tail")
"""Where a prompt's tokens came from; their counts add up to the prompt. ``continued``: approximate KV that an earlier
request left for the same beginning."""
ROUNDING = 64
"""Counts are multiples of this many tokens unless exact ones are asked for: exact ones would tell how much of a guess
is in somebody else's prompt (docs/security.md)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request's prompt.

    Attributes:
        counts: tokens of each of :data:`PARTS`.
        charged: rows with freshly computed QKV, summed over layers, over (layers x rows between prefix and tail).
        selector: the rule's name.
        reason: why there was no fusion, or None.
        reusable: tokens that could have been reused; reported with :attr:`Reason.TOO_LITTLE`.
    """

    counts: tuple[int, ...]
    charged: float
    selector: str
    reason: Reason | None
    reusable: int

    @property
    def parts(self) -> dict[str, int]:
        """Tokens by where they came from, with the names of :data:`PARTS`."""
        return dict(zip(PARTS, self.counts, strict=True))

    @property
    def why(self) -> str:
        """The reason for a prompt that was computed in full; empty for others."""
        return str(self.reason) if self.result == "full" and self.reason is not None else ""

    @property
    def result(self) -> Literal["fused", "continued", "full"]:
        """Whether anything was reused by this request itself, or only what an earlier one had fused, or nothing."""
        parts = self.parts
        if parts["reused"] + parts["recomputed"]:
            return "fused"
        return "continued" if parts["continued"] else "full"

    def report(self, exact: bool) -> dict[str, Any]:
        """The report that the request carries.

        Args:
            exact: whether counts are reported as they are; else in multiples of :data:`ROUNDING`.
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
    """Round the boundaries between the parts, so that parts stay non-negative and add up to the prompt."""
    total, end, rounded = sum(counts), 0, [0]
    for count in counts[:-1]:
        end += count
        rounded.append(min(_round(end), total))
    return [after - before for before, after in zip(rounded, [*rounded[1:], total], strict=True)]


def _round(count: int) -> int:
    return (count + ROUNDING // 2) // ROUNDING * ROUNDING
