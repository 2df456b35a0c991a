"""Short forms of spans."""

from __future__ import annotations

from collections.abc import Iterable

from a3_sglang.matching.span import Span


def places(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """``(start, length)`` of each span."""
    return [(span.start, span.length) for span in spans]
