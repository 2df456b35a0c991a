"""The report of reuse that a request carries in ``meta_info["a3"]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from a3_sglang.cache.request import Reason

PARTS = ("prefix", "continued", "reused", "recomputed", "gap", "tail")
"""Where a prompt's tokens came from; their counts add up to the prompt. ``continued``: approximate KV that an earlier
request left for the same beginning."""
ROUNDING = 64
"""Counts are multiples of this many tokens unless exact ones are asked for: exact ones would tell how much of a guess
is in somebody else's prompt (docs/security.md)."""


def make_report(
    counts: Sequence[int], charged: float, selector: str, reason: Reason | None, reusable: int, exact: bool
) -> dict[str, Any]:
    """The report of one request.

    Args:
        counts: tokens of each of :data:`PARTS`.
        charged: rows with freshly computed QKV, summed over layers, over (layers x rows between prefix and tail).
        selector: the rule's name.
        reason: why there was no fusion, or None.
        reusable: tokens that could have been reused; reported with :attr:`Reason.TOO_LITTLE`.
        exact: whether counts are reported as they are.
    """
    if not exact:
        counts, charged, reusable = _rounded(counts), round(charged, 2), _round(reusable)
    report: dict[str, Any] = dict(zip(PARTS, counts, strict=True))
    report |= {"charged": round(charged, 6), "selector": selector, "reason": None if reason is None else str(reason)}
    if reason is Reason.TOO_LITTLE:
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
