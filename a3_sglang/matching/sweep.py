"""One sweep over a prompt, from left to right, for spans of donors."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import numpy.typing as npt

from a3_sglang.matching.hash_table import Numbers
from a3_sglang.matching.hashing import Hashes
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.segment import Segment, Tokens, common_prefix, starts_with
from a3_sglang.matching.span import Span

_STEPS_PER_BLOCK, _SPARE_STEPS = 2, 256
"""A sweep takes at most this many steps per block of the prompt, plus the spare ones. A step is a position examined, a
donor compared, or a segment followed."""
_LOOKAHEAD = 4
"""Further hits within a block of a span's start at which a better span is looked for."""

CachedLength = Callable[[Segment], int]
"""How many tokens of a segment's path the tree still holds."""


class Sweep:
    """Finds disjoint spans of a prompt.

    At the first position that is not covered yet and at which a block of a donor begins, the longest span of all donors
    of that block is chosen, if it has ``min_span`` tokens and the tree still holds it. The sweep continues after it.

    Args:
        index: the donors; what the tree no longer holds is forgotten on the way.
        namespace: of the prompt.
        prompt: tokens, int32 (n,).
        windows: hash of each window of the prompt, uint64 (n - block + 1,).
        start: first prompt position of the sweep.
        min_span: tokens of the shortest span.
        cached_length: called once per donor that would be chosen; None: the tree holds all of every donor.
    """

    def __init__(
        self,
        index: AnyPositionIndex,
        namespace: Hashable,
        prompt: Tokens,
        windows: Hashes,
        start: int,
        min_span: int,
        cached_length: CachedLength | None,
    ) -> None:
        self._index, self._namespace, self._prompt, self._windows = index, namespace, prompt, windows
        self._start, self._min_span = start, min_span
        self._ask_length = cached_length
        self._lengths: dict[Segment, int] = {}
        self._budget = _Budget(_STEPS_PER_BLOCK * (len(prompt) // index.block) + _SPARE_STEPS)
        self._lookahead = _LOOKAHEAD if index.line_ends.any() else 0
        self._spans: list[Span] = []

    def run(self) -> list[Span]:
        """Sweep the prompt and return its spans, ascending by prompt position."""
        heads = self._heads()
        hit_pos = np.flatnonzero(heads >= 0)
        i = int(np.searchsorted(hit_pos, self._start))
        while i < len(hit_pos) and self._budget.spend():
            span = self._best_span(heads, hit_pos, i)
            if span is None:
                i += 1
            else:
                self._append(span)
                i = int(np.searchsorted(hit_pos, self._spans[-1].end))
        self._index.steps += self._budget.spent
        self._index.compact()
        return self._spans

    def _heads(self) -> Numbers:
        """The newest living block that each window may begin a span with, -1 if there is none; int32 (windows,)."""
        index = self._index
        heads, skipped = index.blocks.newest_living(self._windows)
        index.steps += len(self._windows) + skipped
        # A span of more than one block is a hit at its second block, too.
        if self._min_span > index.block + index.unit - index.page_size:
            following = np.append(heads[index.block :], np.full(min(index.block, len(heads)), -1, np.int32))
            heads = np.where(following >= 0, heads, -1)
        return heads

    def _best_span(self, heads: Numbers, hit_pos: npt.NDArray[np.intp], i: int) -> Span | None:
        """The span to choose at the ``i``-th hit, or instead at one of the next few; None if no donor has one here.

        Args:
            heads: see :meth:`_heads`.
            hit_pos: prompt positions of the hits, ascending.
            i: index of the hit.
        """
        pos = int(hit_pos[i])
        span = self._longest_span(pos, int(heads[pos]))
        if span is None:
            return None
        floor = self._spans[-1].end if self._spans else self._start
        span = self._to_line_ends(span, floor)
        # The donor of the whole line may have its first whole block a little later than one that shares part of it.
        for other_pos in map(int, hit_pos[i + 1 : i + 1 + self._lookahead]):
            if span.start == floor or other_pos >= pos + self._index.block:
                break
            other = self._longest_span(other_pos, int(heads[other_pos]))
            other = other and self._to_line_ends(other, floor)
            if other is not None and other.start <= span.start and other.length > span.length:
                span = other
        return span

    def _longest_span(self, pos: int, number: int) -> Span | None:
        """The longest span at a prompt position that the tree still holds; None if none is long enough.

        Args:
            pos: prompt position.
            number: of the newest living block with the content that begins there.
        """
        index, blocks = self._index, self._index.blocks
        newer = -1
        while number >= 0 and self._budget.left:
            spans: list[tuple[Span, int]] = []
            tried = 0
            while number >= 0 and tried < index.candidates and self._budget.spend():
                older, segment = int(blocks.older[number]), index.segment_of(number, self._namespace)
                if segment is not None:
                    tried += 1
                    spans.append((self._follow(pos, number, segment), number))
                if blocks.live[number]:
                    newer = number
                elif newer >= 0:
                    blocks.older[newer] = older
                number = older
            while spans:
                # Of equally long ones the newest comes first.
                span, first = spans.pop(max(range(len(spans)), key=lambda i: spans[i][0].length))
                if span.length < self._min_span:
                    break
                # Two of these spans may be of one donor, which the first of them may have caused to be forgotten.
                if index.holds(span):
                    length = self._cached_length(span.segment)
                    if span.donor_end <= length:
                        return span
                    index.drop(span.segment, length)
                segment = index.segment_of(first, self._namespace)
                if segment is not None and self._budget.spend():
                    # The tree lost only the donor's end.
                    spans.append((self._follow(pos, first, segment), first))
        return None

    def _follow(self, pos: int, number: int, segment: Segment) -> Span:
        """The span of whole blocks that begins at a prompt position and with a block of a segment.

        Args:
            pos: prompt position.
            number: of the block.
            segment: that the block belongs to.
        """
        index, prompt = self._index, self._prompt
        block, unit = index.block, index.unit
        offset = end = segment.begin + int(index.blocks.ordinal[number]) * block
        shift = pos - offset
        while True:
            whole = index.whole_end(segment)
            same = common_prefix(segment.tokens[end - segment.begin : whole - segment.begin], prompt[end + shift :])
            end += same // block * block
            # Other donors branch off at whole units.
            branch = end - end % unit
            first = self._windows[branch + shift : branch + shift + unit : block].tobytes()
            child = segment.children.get((branch, first))
            if child is None or not starts_with(prompt[branch + shift :], child.tokens[:unit]):
                break
            if not self._budget.spend():
                break
            segment, end = child, branch
        rest = segment.tokens[end - segment.begin :]
        if end == whole and len(rest):
            if starts_with(prompt[end + shift :], rest):
                end = segment.end
            elif not any(begin == end for begin, _ in segment.children):
                end -= block  # The last block is matched together with the tokens after it, or not at all.
        return Span(pos, max(end - offset, 0), segment, offset)

    def _cached_length(self, segment: Segment) -> int:
        if self._ask_length is None:
            return segment.end
        if segment not in self._lengths:
            self._lengths[segment] = self._ask_length(segment)
        return self._lengths[segment]

    # ---- lines

    def _to_line_ends(self, span: Span, floor: int) -> Span:
        """Extend a span by less than a block on each side, if a line of the donor begins or ends there.

        At a donor's end the last block is matched only together with what follows it, so there it may be added too.

        Args:
            span: of whole blocks.
            floor: the first prompt position that it may cover.
        """
        segment, prompt, block = span.segment, self._prompt, self._index.block
        reach = block - 1
        path = segment.path(min(span.donor_end + reach + block, self._cached_length(segment)))
        before = path[max(span.offset - reach, 0) : span.offset]
        begin = span.start - min(len(before), span.start - floor)
        same = common_prefix(before[::-1], prompt[begin : span.start][::-1])
        after = path[span.donor_end :]
        common = common_prefix(after, prompt[span.end :])
        # A line begins after the token that ends the previous one, or with the path.
        starts = np.flatnonzero(self._ends_line(path[max(span.offset - same - 1, 0) : span.offset]))
        ends = np.flatnonzero(self._ends_line(after[:common]))
        left = 0
        if span.offset == same:
            left = same
        elif len(starts):
            left = min(same, same - int(starts[0]))
        right = int(ends[-1]) + 1 if len(ends) else 0
        return Span(span.start - left, left + span.length + right, segment, span.offset - left)

    def _append(self, span: Span) -> None:
        """Add a span, together with the token before it if that ends a line and is the same in its donor.

        Later tokens attend to the ends of lines. The first row of a span drifts most and is recomputed before others;
        the last one hardly ever is.
        """
        before = span.segment.path(span.offset, max(span.offset - 1, 0))
        last = self._spans[-1] if self._spans and self._spans[-1].end == span.start else None
        free = span.start > self._start and (last is None or last.length > self._min_span)
        if free and len(before) and before[0] == self._prompt[span.start - 1] and self._ends_line(before)[0]:
            if last is not None:
                self._spans[-1] = Span(last.start, last.length - 1, last.segment, last.offset)
            span = Span(span.start - 1, span.length + 1, span.segment, span.offset - 1)
        self._spans.append(span)

    def _ends_line(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        line_ends = self._index.line_ends
        in_vocabulary = (tokens >= 0) & (tokens < len(line_ends))
        return in_vocabulary & line_ends[np.where(in_vocabulary, tokens, 0)]


class _Budget:
    """The steps that one sweep may take."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.spent = 0

    @property
    def left(self) -> bool:
        return self.spent < self._steps

    def spend(self) -> bool:
        """Take one step; False if there is none left."""
        self.spent += 1
        return self.spent <= self._steps
