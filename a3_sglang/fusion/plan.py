"""Which part of a prompt comes from where: prefix, spans, gaps, tail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from a3_sglang.cache.index import Run

MIN_TAIL = 32
"""Tokens at a prompt's end that are always computed: the probe needs a question, also where it was asked before."""


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens ``[start, start + length)`` that a donor holds from its position ``offset`` on."""

    start: int
    length: int
    offset: int
    run: Run

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Plan:
    """``prefix`` exact tokens, then spans and gaps up to ``end``, then the tail."""

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

    def gaps(self) -> Iterator[tuple[int, int]]:
        """``(start, end)`` of each gap."""
        at = self.prefix
        for span in self.spans:
            if at < span.start:
                yield at, span.start
            at = span.end
        if at < self.end:
            yield at, self.end


def make_plan(runs: Sequence[Run], prefix: int, prompt: int, limit: int, page_size: int) -> Plan | None:
    """Turn runs into a plan; None where nothing is left of them.

    Args:
        runs: disjoint runs by their place in the prompt, all behind ``prefix``.
        prefix: tokens of the exact prefix; a multiple of ``page_size``.
        prompt: tokens of the prompt.
        limit: prompt tokens that may come from a cache (the scheduler keeps some back for logprobs).
        page_size: the tail starts at a multiple of it, as slots are allocated by the page.
    """
    furthest = min(limit, prompt - MIN_TAIL)
    furthest -= furthest % page_size
    spans = tuple(
        Span(run.start, min(run.end, furthest) - run.start, run.offset, run) for run in runs if run.start < furthest
    )
    if not spans:
        return None
    end = spans[-1].end
    return Plan(prefix, end + -end % page_size, spans)
