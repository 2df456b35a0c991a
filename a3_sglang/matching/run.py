"""Tokens that a prompt and a donor have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from a3_sglang.matching.segment import Segment


@dataclass(frozen=True, slots=True)
class Run:
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


def runs_from(runs: Iterable[Run], start: int, shortest: int) -> Iterator[Run]:
    """What runs cover from a prompt position on, without what is then shorter than ``shortest`` tokens."""
    for run in runs:
        cut = max(start - run.start, 0)
        if run.length - cut >= shortest:
            yield Run(run.start + cut, run.length - cut, run.segment, run.offset + cut)


def merge_runs(runs: Sequence[Run], others: Iterable[Run], shortest: int) -> list[Run]:
    """Add to disjoint runs what others cover between them; ascending by prompt position.

    Args:
        runs: disjoint, ascending by prompt position.
        others: disjoint; cut to what ``runs`` leave, and omitted if that is less than ``shortest`` tokens.
        shortest: tokens of the shortest run.
    """
    added: list[Run] = []
    for run in others:
        at = run.start
        for taken in (*runs, Run(run.end, 0, run.segment, 0)):
            if taken.end <= at:
                continue
            until = min(taken.start, run.end)
            if until - at >= shortest:
                added.append(Run(at, until - at, run.segment, run.offset + at - run.start))
            at = max(at, taken.end)
            if at >= run.end:
                break
    return sorted((*runs, *added), key=lambda run: run.start)
