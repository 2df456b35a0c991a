"""Plans: the prefix, spans, gaps and tail of a prompt."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from a3_sglang.matching.span import Span

MIN_TAIL = 32
"""Tokens at a prompt's end that are always computed: the probe needs a question, even one that was asked before."""
QUESTION_TOKENS = 64
"""Maximum number of tokens whose attention the probe reads."""
SHORTEST_QUESTION, LONGEST_QUESTION = 16, 256
"""Length in tokens of a gap that may be a question: shorter ones result from matching in blocks, longer are text."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the KV of each part of a prompt is obtained.

    Attributes:
        prefix: tokens whose KV the tree has.
        end: prompt position at which the tail begins; spans and gaps are between the prefix and it.
        spans: disjoint, ascending by prompt position.
    """

    prefix: int
    end: int
    spans: tuple[Span, ...]

    @property
    def reused(self) -> int:
        """Tokens covered by spans."""
        return sum(span.length for span in self.spans)

    @property
    def gap(self) -> int:
        """Tokens between prefix and tail that no span covers."""
        return self.end - self.prefix - self.reused

    def rows(self, ratio: float) -> int:
        """Rows computed between prefix and tail if this share of the reused tokens is recomputed."""
        return self.gap + math.ceil(ratio * self.reused)

    def gap_ranges(self) -> Iterator[tuple[int, int]]:
        """``(start, end)`` of each gap, as prompt positions."""
        pos = self.prefix
        for span in self.spans:
            if pos < span.start:
                yield pos, span.start
            pos = span.end
        if pos < self.end:
            yield pos, self.end

    def gap_at_edges(self, block: int) -> int:
        """Gap tokens less than a block away from a span.

        The donor may hold them too, but matching in whole blocks left them out.

        Args:
            block: tokens per hash block of the index.
        """
        starts, ends = {span.start for span in self.spans}, {span.end for span in self.spans}
        return sum(
            min(end - start, (block - 1) * ((start in ends) + (end in starts))) for start, end in self.gap_ranges()
        )

    def ratio(self, nominal: float, block: int) -> float:
        """The share of the reused tokens to recompute if the tokens of :meth:`gap_at_edges` count towards ``nominal``.

        These are computed in any case; counting them keeps the total work at what the ratio promises. At least half of
        the nominal ratio is left for the rows that the selector picks.

        Args:
            nominal: the ratio that was asked for.
            block: tokens per hash block of the index.
        """
        edges = self.gap_at_edges(block) / self.reused
        return max(nominal / 2, nominal - (1 - nominal) * edges)


def make_plan(
    spans: Sequence[Span], prefix: int, prompt_len: int, limit: int, page_size: int, end: int | None = None
) -> Plan | None:
    """Make a plan of spans; None if no span begins early enough to be used.

    Args:
        spans: disjoint, ascending by prompt position, all after ``prefix``.
        prefix: tokens of the exact prefix; a multiple of ``page_size``.
        prompt_len: tokens of the prompt.
        limit: prompt tokens that may come from a cache (the scheduler withholds some for logprobs).
        page_size: the tail starts at a multiple of it, because slots are allocated in pages.
        end: prompt position of the tail, if that is fixed already; None: after the last span.
    """
    furthest = min(limit, prompt_len - MIN_TAIL)
    furthest -= furthest % page_size
    if end is not None:
        furthest = min(furthest, end)
    return _cut(prefix, spans, furthest, page_size, end)


def _cut(prefix: int, spans: Sequence[Span], furthest: int, page_size: int, end: int | None = None) -> Plan | None:
    """A plan of these spans up to prompt position ``furthest``; None if no span begins before it."""
    kept = tuple(replace(span, length=min(span.end, furthest) - span.start) for span in spans if span.start < furthest)
    if not kept:
        return None
    if end is None:
        end = kept[-1].end
        end += -end % page_size
    return Plan(prefix, end, kept)


def first_step(
    plan: Plan, ratio: float, max_rows: int, page_size: int, min_span: int
) -> tuple[Plan | None, int | None]:
    """Cut a plan to what one step of a chunked prefill can fuse.

    Args:
        plan: of the whole prompt.
        ratio: share of the reused tokens that is recomputed.
        max_rows: rows that may be computed between prefix and tail.
        page_size: the step ends at a multiple of it.
        min_span: tokens of the shortest remainder of a span that a later step reuses.

    Returns:
        The plan up to the position at which ``max_rows`` are computed, or None if no span begins before it; and the
        prompt position from which a later step can reuse tokens, or None.
    """
    reach = _reach(plan, ratio, max_rows)
    if reach >= plan.end:
        return plan, None
    first = _cut(plan.prefix, plan.spans, reach // page_size * page_size, page_size)
    pos = first.end if first is not None else plan.prefix
    left = (max(span.start, pos) for span in plan.spans if span.end - max(span.start, pos) >= min_span)
    return first, next(left, None)


def _reach(plan: Plan, ratio: float, max_rows: int) -> int:
    """The last prompt position up to which :meth:`Plan.rows` is at most ``max_rows``, outside gaps.

    A position within a gap is moved back to the end of the span before it.
    """
    pos, gap, reused = plan.prefix, 0, 0
    for span in plan.spans:
        gap += span.start - pos
        fits = _fitting(span.length, reused, ratio, max_rows - gap)
        if fits < span.length:
            return pos if fits < 0 else span.start + fits
        pos, reused = span.end, reused + span.length
    return plan.end


def _fitting(length: int, reused: int, ratio: float, room: int) -> int:
    """How many of ``length`` more reused tokens keep the recomputed ones within ``room``; -1 if even 0 are too many."""
    return bisect_right(range(length + 1), room, key=lambda more: math.ceil(ratio * (reused + more))) - 1


def question_ranges(plan: Plan, prompt_len: int, given: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """Positions of a prompt's question: ascending ranges ``(start, end)`` of at most :data:`QUESTION_TOKENS` in total.

    Unless a range is given, these are the tail and the short gaps, since a question may come before or between the
    passages and may be followed by instructions. If they are too long, only the beginning of each gap is used, and the
    beginning and the end of the tail (or of the given range); if it is longer than :data:`LONGEST_QUESTION`, only its
    end.

    Args:
        plan: of the prompt.
        prompt_len: tokens of the prompt.
        given: the range that the client marked as the question.
    """
    ranges = []
    if given is None:
        given = plan.end, prompt_len
        ranges = [
            (start, end) for start, end in plan.gap_ranges() if SHORTEST_QUESTION <= end - start <= LONGEST_QUESTION
        ]
    start, end = given
    if end - start <= LONGEST_QUESTION:
        middle = (start + end) // 2
        ranges.append((start, middle))
        start = middle
    lengths = _shares([*(stop - begin for begin, stop in ranges), end - start], QUESTION_TOKENS)
    cut = [(begin, begin + length) for (begin, _), length in zip(ranges, lengths[:-1], strict=True)]
    return [*cut, (end - lengths[-1], end)]


def _shares(wanted: Sequence[int], total: int) -> list[int]:
    """Divide a total so that the smallest share is as large as possible and no share is larger than wanted."""
    shares = [0] * len(wanted)
    for done, i in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        shares[i] = min(wanted[i], total // (len(wanted) - done))
        total -= shares[i]
    return shares
