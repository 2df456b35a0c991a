"""Spans: tokens that a prompt and a donor have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from a3_sglang.matching.segment import Segment


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens ``[start, start + length)``, equal to those of a donor's path from its position ``offset`` on.

    Attributes:
        start: prompt position of the first token.
        length: tokens.
        segment: holds the end of the donor's path that is matched.
        offset: position of the first token in the donor's path.
    """

    start: int
    length: int
    segment: Segment
    offset: int

    @property
    def end(self) -> int:
        """Prompt position after the last token."""
        return self.start + self.length

    @property
    def donor_end(self) -> int:
        """Position after the last token in the donor's path."""
        return self.offset + self.length


def spans_from(spans: Iterable[Span], start: int, min_span: int) -> Iterator[Span]:
    """Cut spans to what is after prompt position ``start``; drop those with fewer than ``min_span`` tokens left."""
    for span in spans:
        cut = max(start - span.start, 0)
        if span.length - cut >= min_span:
            yield Span(span.start + cut, span.length - cut, span.segment, span.offset + cut)


def merge_spans(spans: Sequence[Span], others: Iterable[Span], min_span: int) -> list[Span]:
    """Add to disjoint spans what others cover between them; ascending by prompt position.

    Args:
        spans: disjoint, ascending by prompt position.
        others: disjoint; cut to what ``spans`` leave, and omitted if that is less than ``min_span`` tokens.
        min_span: tokens of the shortest span.
    """
    added: list[Span] = []
    for span in others:
        pos = span.start
        for taken in (*spans, Span(span.end, 0, span.segment, 0)):
            if taken.end <= pos:
                continue
            free_end = min(taken.start, span.end)
            if free_end - pos >= min_span:
                added.append(Span(pos, free_end - pos, span.segment, span.offset + pos - span.start))
            pos = max(pos, taken.end)
            if pos >= span.end:
                break
    return sorted((*spans, *added), key=lambda span: span.start)
