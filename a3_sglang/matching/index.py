"""Any-position index: which runs of a prompt are anywhere in the radix tree.

The index knows tokens only. A *donor* is a path of the radix tree; its tokens are cut into blocks of ``block`` tokens,
counted from the root. The hash of every window of a prompt (stride 1) is looked up, so a block of a donor is found
wherever it is in the prompt. A hit is compared token by token, so a hash collision costs time and nothing else, and
followed block by block.

A run consists of whole blocks of one donor. It is never extended token by token: if it were, a client could read
other clients' prompts by guessing one token at a time. A guess has to be right about a whole block at once. Blocks are
cut where a line ends in the donor, so a run may begin or end there, too; documents usually do.

Donors that share a prefix share its blocks, as they share its KV in the tree: the index is a trie of segments, each
holding only what no earlier donor had. Segments begin where whole blocks and whole pages of the tree (*units*) do, and
may end at any page. The tokens after a segment's last unit have no hash of their own; they are matched together with
the block before them, all or nothing, so that a donor can be reused to its end.

An entry does not hold slots. Its owner asks the tree for them (by the path's tokens) when a run is used; if the tree
no longer has them, :meth:`AnyPositionIndex.forget` drops the entries.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]
_U64 = np.uint64
_MULTIPLIER = _U64(0x9E3779B97F4A7C15)
_STEPS_PER_BLOCK, _SPARE_STEPS = 2, 256
"""A search takes at most so many steps per block of the prompt, and so many besides: one for every position looked at,
donor compared and segment followed."""
_AHEAD = 4
"""Hits within a block of a run's beginning at which a better run is looked for."""
_DEAD_ROUNDS = 64
"""Blocks of forgotten donors that a search skips, at most, before it finds a living one with the same content."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens ``[start, start + length)`` of a prompt equal ``[offset, offset + length)`` of a donor's path."""

    start: int
    length: int
    segment: Segment
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.length

    def path(self, page_size: int = 1) -> Tokens:
        """Tokens of the donor from the root to the end of the page the run ends in, int32."""
        end = self.offset + self.length
        return self.segment.path(end + -end % page_size)


@dataclass(eq=False, slots=True)
class Segment:
    """The part of a donor's path that starts where it leaves its parent.

    Attributes:
        namespace: whose tokens these are.
        parent: None for the root of a namespace, which has no tokens.
        begin: position of its first token in the path; a multiple of the unit.
        tokens: int32, whole pages.
        children: by position and the content hashes of their first unit's blocks.
        number: of the segment; -1 for roots.
        blocks: ``(first block, count)`` of its blocks in the index's arrays, in order.
        mark: the donor's, as given to :meth:`AnyPositionIndex.add`.
    """

    namespace: Hashable
    parent: Segment | None
    begin: int
    tokens: Tokens
    children: dict[tuple[int, bytes], Segment] = field(default_factory=dict)
    number: int = -1
    blocks: list[tuple[int, int]] = field(default_factory=list)
    mark: Hashable = None

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)

    def path(self, end: int, begin: int = 0) -> Tokens:
        """Tokens ``[begin, end)`` of the path, int32."""
        parts: list[Tokens] = [self.tokens[:0]]
        node: Segment | None = self
        while node is not None and begin < end:
            parts.append(node.tokens[max(begin - node.begin, 0) : max(end - node.begin, 0)])
            end = min(end, node.begin)
            node = node.parent
        return np.concatenate(parts[::-1])


Held = Callable[[Segment], int]
"""How many tokens of a segment's path the tree still holds."""


class _BlockTable:
    """Open-addressing hash table from 64-bit hashes to the newest block with that hash.

    Holds int32 block numbers only; the hashes themselves lie in the caller's array. Batch operations are
    vectorized over the keys.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._slots = np.full(capacity, -1, np.int32)
        self._used = 0

    @property
    def nbytes(self) -> int:
        return self._slots.nbytes

    def get(self, keys: npt.NDArray[np.uint64], hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Newest block of each key, -1 where there is none. Shapes (n,) -> (n,)."""
        found = np.full(len(keys), -1, np.int32)
        mask = len(self._slots) - 1
        pending = np.arange(len(keys))
        at = self._home(keys)
        while len(pending):
            block = self._slots[at]
            occupied = block >= 0
            same = occupied & (hashes[block] == keys[pending])
            found[pending[same]] = block[same]
            further = occupied & ~same
            pending, at = pending[further], (at[further] + 1) & mask
        return found

    def put(self, keys: npt.NDArray[np.uint64], blocks: npt.NDArray[np.int32], hashes: npt.NDArray[np.uint64]) -> None:
        """Point each key at its block, in place of an older block of the same key. Keys are distinct."""
        while (self._used + len(keys)) * 2 > len(self._slots):
            self._grow(hashes)
        mask = len(self._slots) - 1
        pending = np.arange(len(keys))
        at = self._home(keys)
        while len(pending):
            # Two keys may want the same free slot in this round: the last write wins, the others walk on.
            block = self._slots[at]
            replaces = (block >= 0) & (hashes[block] == keys[pending])
            free = block < 0
            self._slots[at[free]] = blocks[pending[free]]
            self._slots[at[replaces]] = blocks[pending[replaces]]
            won = self._slots[at] == blocks[pending]
            self._used += int((won & free).sum())
            pending, at = pending[~won], (at[~won] + 1) & mask

    def _grow(self, hashes: npt.NDArray[np.uint64]) -> None:
        kept = self._slots[self._slots >= 0]
        self._slots = np.full(len(self._slots) * 2, -1, np.int32)
        self._used = 0
        if len(kept):
            self.put(hashes[kept], kept, hashes)

    def _home(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        mask = _U64(len(self._slots) - 1)
        return ((keys ^ (keys >> _U64(29))) & mask).astype(np.int64)


class AnyPositionIndex:
    """Finds runs of a prompt in donors.

    Args:
        min_span: shortest run that is found, in tokens; blocks are half as long.
        capacity: indexed tokens above which the donors used longest ago are forgotten (None: no bound). The
            radix tree evicts without telling; twice its size keeps all that can still be there.
        candidates: how many donors with the same block are compared, newest first.
        page_size: the tree's.
        line_ends: bool (vocabulary,), the tokens that end a line; None: none does.
    """

    def __init__(
        self,
        min_span: int = 32,
        capacity: int | None = None,
        candidates: int = 16,
        page_size: int = 1,
        line_ends: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        if min_span < 1:
            raise ValueError(f"min_span must be at least 1, not {min_span}")
        self.min_span = min_span
        self.block = (min_span + 1) // 2
        self._page = page_size
        self._unit = math.lcm(self.block, page_size)
        self.capacity = capacity
        self.candidates = candidates
        self._line_ends = np.zeros(1, np.bool_) if line_ends is None else line_ends
        self._ahead = _AHEAD if self._line_ends.any() else 0
        self.generation = 0
        """Grows when blocks get new numbers."""
        self.steps = 0
        """Work of all searches: windows hashed, and steps of :data:`_STEPS_PER_BLOCK`."""
        powers = np.empty(self.block, _U64)
        powers[0] = 1
        with np.errstate(over="ignore"):
            for i in range(1, self.block):
                powers[i] = powers[i - 1] * _MULTIPLIER
        self._powers = powers
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._roots: dict[tuple[Hashable, Hashable], Segment] = {}
        # Segments by number; the order of the dict is the order of last use.
        self._segments: OrderedDict[int, Segment] = OrderedDict()
        self._next_number = 0
        self._tokens = 0
        self._clear_blocks()

    def _clear_blocks(self) -> None:
        self._hash, self._chain = np.zeros(64, _U64), np.zeros(64, _U64)
        self._owner, self._ordinal, self._older = (np.zeros(64, np.int32) for _ in range(3))
        self._live = np.zeros(64, np.bool_)
        self._count = self._dead = 0
        self._by_content, self._by_path = _BlockTable(), _BlockTable()
        self.generation += 1

    def __len__(self) -> int:
        """Indexed tokens; those of a prefix that donors share count once."""
        return self._tokens

    @property
    def nbytes(self) -> int:
        """Bytes held by tokens, hashes and tables (segments' own objects: under 1 KiB each)."""
        arrays = (self._hash, self._chain, self._owner, self._ordinal, self._older, self._live)
        tokens = sum(s.tokens.nbytes for s in self._segments.values())
        return tokens + sum(a.nbytes for a in arrays) + self._by_content.nbytes + self._by_path.nbytes

    # ---- donors

    def add(self, namespace: Hashable, tokens: Ids, mark: Hashable = None) -> None:
        """Make a path of the tree a donor. Known leading blocks are not stored again.

        Args:
            namespace: whose tokens these are.
            tokens: of the path, from the root.
            mark: how its owner tells this path from others of the same tokens. Searches find donors of all marks.
        """
        path, content, chain = self._path_hashes(namespace, tokens, mark)
        if not len(content):
            return
        segment, known = self._longest_known(namespace, mark, path, chain)
        known -= known % (self._unit // self.block)
        if known < len(content):
            first = content[known : known + self._unit // self.block].tobytes()
            segment = self._grow(namespace, mark, segment, path, known * self.block, first)
            self._index_blocks(segment, content[known:], chain[known:])
        assert segment is not None
        self._touch(segment)
        while self.capacity is not None and self._tokens > self.capacity and len(self._segments) > 1:
            self._cut(next(iter(self._segments.values())), 0)
        self._compact()

    def _grow(
        self,
        namespace: Hashable,
        mark: Hashable,
        segment: Segment | None,
        path: Tokens,
        begin: int,
        content: bytes,
    ) -> Segment:
        """Put a path's tokens from ``begin`` on into the segment that knows those before, or into a new one."""
        while segment is not None and segment.parent is not None and begin == segment.begin:
            segment = segment.parent
        if segment is None:
            segment = self._roots.get((namespace, mark)) or Segment(
                namespace, None, 0, np.empty(0, np.int32), mark=mark
            )
        whole = self._whole_end(segment)
        if (
            segment.parent is None
            or begin < whole
            or not _starts_with(path[begin:], segment.tokens[whole - segment.begin :])
        ):
            segment = self._new_segment(segment, begin, content)
        else:
            # The path continues this donor; tokens that did not fill a unit before are indexed with what follows.
            self._tokens -= segment.end - begin
            segment.tokens = segment.tokens[: begin - segment.begin]
        segment.tokens = np.concatenate([segment.tokens, path[begin:]])
        self._tokens += len(path) - begin
        return segment

    def known_prefix(self, namespace: Hashable, tokens: Ids) -> int:
        """How many of a prompt's first tokens are a donor's first tokens too, in whole blocks and pages."""
        path, _, chain = self._path_hashes(namespace, tokens, None)
        _, known = self._longest_known(namespace, None, path, chain)
        return known * self.block // self._unit * self._unit

    def forget(self, segment: Segment, keep: int) -> None:
        """The tree holds only the first ``keep`` tokens of this segment's path: drop what comes after them."""
        self._forget(segment, keep)
        self._compact()

    def _forget(self, segment: Segment, keep: int) -> None:
        # Tokens after the last whole unit are a donor's end, and what is left of this one is none.
        keep -= keep % self._unit
        node = segment
        while node.parent is not None and keep < node.end:
            parent = node.parent
            self._cut(node, max(keep - node.begin, 0))
            if keep >= node.begin:
                break
            node = parent

    def _new_segment(self, parent: Segment, begin: int, content: bytes) -> Segment:
        segment = Segment(
            parent.namespace, parent, begin, np.empty(0, np.int32), number=self._next_number, mark=parent.mark
        )
        self._next_number += 1
        self._segments[segment.number] = segment
        namesake = parent.children.pop((begin, content), None)
        if namesake is not None:  # Equal hashes of different blocks: the newer one is kept.
            self._cut(namesake, 0)
        parent.children[begin, content] = segment
        if parent.parent is None:
            self._roots[parent.namespace, parent.mark] = parent
        return segment

    def _touch(self, segment: Segment) -> None:
        node: Segment | None = segment
        # Parents last: a prefix is used whenever one of its continuations is.
        while node is not None and node.number in self._segments:
            self._segments.move_to_end(node.number)
            node = node.parent

    def touch(self, run: Run) -> None:
        """Note that a run was used, so that its donor is forgotten later than others."""
        self._touch(run.segment)

    def _cut(self, segment: Segment, keep: int) -> None:
        """Cut a segment to its first ``keep`` tokens (whole units), with all that branches off after them."""
        pending = [(segment, keep)]
        while pending:
            node, keep = pending.pop()
            pending += [(child, 0) for child in node.children.values() if child.begin > node.begin + keep or not keep]
            kept = self._blocks_in(keep)
            self._dead += self._blocks_in(len(node.tokens)) - kept
            self._tokens -= len(node.tokens) - keep
            node.tokens = node.tokens[:keep].copy()
            ranges, node.blocks = node.blocks, []
            for first, count in ranges:
                left = min(count, max(kept, 0))
                self._live[first + left : first + count] = False
                kept -= left
                if left:
                    node.blocks.append((first, left))
            if not keep:
                self._remove(node)

    def _remove(self, segment: Segment) -> None:
        """Take a segment without tokens out of the trie, and its root if nothing else hangs there."""
        del self._segments[segment.number]
        parent = segment.parent
        assert parent is not None
        parent.children = {key: child for key, child in parent.children.items() if child is not segment}
        root = (parent.namespace, parent.mark)
        if parent.parent is None and not parent.children and self._roots.get(root) is parent:
            del self._roots[root]

    def _compact(self) -> None:
        """Drop dead blocks once they are the majority."""
        if self._dead > 1024 and self._dead * 2 > self._count:
            self._rebuild()

    # ---- blocks

    def _index_blocks(self, segment: Segment, content: npt.NDArray[np.uint64], chain: npt.NDArray[np.uint64]) -> None:
        """Enter blocks that follow those which the segment has already."""
        n = len(content)
        if not n:
            return
        first, have = self._count, sum(count for _, count in segment.blocks)
        self._reserve(first + n)
        new = np.arange(first, first + n, dtype=np.int32)
        self._hash[first : first + n] = content
        self._chain[first : first + n] = chain
        self._owner[first : first + n] = segment.number
        self._ordinal[first : first + n] = have + np.arange(n)
        self._live[first : first + n] = True
        segment.blocks.append((first, n))
        self._count += n
        # Blocks with equal content form a list, newest first. Of equal blocks within one path only two are listed, so
        # that one repeated token does not fill a list: the first, as a run that starts there covers the others, and
        # the last, as what follows it is something else.
        self._older[first : first + n] = -1
        _, earliest = np.unique(content, return_index=True)
        _, latest = np.unique(content[::-1], return_index=True)
        latest = n - 1 - latest
        for listed in (earliest, latest[latest != earliest]):
            self._older[new[listed]] = self._by_content.get(content[listed], self._hash)
            self._by_content.put(content[listed], new[listed], self._hash)
        self._by_path.put(chain, new, self._chain)

    def _reserve(self, n: int) -> None:
        if n <= len(self._hash):
            return
        size = max(n, len(self._hash) * 5 // 4)
        for name in ("_hash", "_chain", "_owner", "_ordinal", "_older", "_live"):
            old = getattr(self, name)
            grown = np.zeros(size, old.dtype)
            grown[: self._count] = old[: self._count]
            setattr(self, name, grown)

    def _rebuild(self) -> None:
        """Number the living blocks anew, without the dead ones."""
        hashes, chains = self._hash, self._chain
        self._clear_blocks()
        for segment in self._segments.values():
            kept = np.concatenate([np.arange(0), *(np.arange(first, first + n) for first, n in segment.blocks)])
            segment.blocks = []
            self._index_blocks(segment, hashes[kept], chains[kept])

    def _path_hashes(
        self, namespace: Hashable, tokens: Ids, mark: Hashable
    ) -> tuple[Tokens, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """The whole pages at a path's beginning; the content and chain hashes of the blocks of its whole units."""
        path = np.asarray(tokens, np.int32)[: len(tokens) // self._page * self._page]
        whole = path[: self._blocks_in(len(path)) * self.block]
        content = self._block_hashes(whole.reshape(-1, self.block), namespace)
        return path, content, beginning_hashes(mark, content)[1:]

    def _blocks_in(self, tokens: int) -> int:
        """Blocks of the whole units among so many tokens."""
        return tokens // self._unit * self._unit // self.block

    def _whole_end(self, segment: Segment) -> int:
        """Where a segment's last whole unit ends, as a position in its path."""
        return segment.begin + len(segment.tokens) // self._unit * self._unit

    def _block_hashes(self, windows: npt.NDArray[np.int32], namespace: Hashable) -> npt.NDArray[np.uint64]:
        """Polynomial hashes of windows of ``block`` tokens, shape (n, block) -> (n,)."""
        with np.errstate(over="ignore"):
            value = np.full(len(windows), _hash(namespace), _U64)
            for j in range(self.block):
                value += (windows[:, j].astype(_U64) + _U64(1)) * self._powers[j]
            return _mix(value)

    def _longest_known(
        self, namespace: Hashable, mark: Hashable, path: Tokens, chain: npt.NDArray[np.uint64]
    ) -> tuple[Segment | None, int]:
        """The segment that holds the deepest known block of this path, and how many blocks are known."""
        blocks = self._by_path.get(chain, self._chain)
        for known in (np.flatnonzero(blocks >= 0) + 1)[::-1]:
            segment = self._alive(int(blocks[known - 1]), namespace)
            length = int(known) * self.block
            if segment is not None and segment.mark == mark and np.array_equal(segment.path(length), path[:length]):
                return segment, int(known)
        return None, 0

    def _alive(self, block: int, namespace: Hashable) -> Segment | None:
        if not self._live[block]:
            return None
        segment = self._segments[int(self._owner[block])]
        return segment if segment.namespace == namespace else None

    # ---- search

    def search(self, namespace: Hashable, tokens: Ids) -> PromptSearch:
        """The search for one prompt, which may be asked again and again."""
        return PromptSearch(self, namespace, np.asarray(tokens, np.int32))

    def find(
        self,
        namespace: Hashable,
        tokens: Ids,
        start: int = 0,
        min_span: int | None = None,
        held: Held | None = None,
    ) -> list[Run]:
        """What :meth:`PromptSearch.runs` finds in a prompt that is asked for once."""
        return self.search(namespace, tokens).runs(start, min_span, held)

    def window_hashes(self, namespace: Hashable, prompt: Tokens) -> npt.NDArray[np.uint64]:
        """Hash of every ``block`` tokens of a prompt, stride 1; uint64 (len(prompt) - block + 1,)."""
        if len(prompt) < self.block:
            return np.empty(0, _U64)
        return self._block_hashes(np.lib.stride_tricks.sliding_window_view(prompt, self.block), namespace)

    def indexed_since(self, count: int) -> npt.NDArray[np.uint64]:
        """Content hashes of the blocks that were entered after the first ``count`` of this generation."""
        return self._hash[count : self._count]

    @property
    def count(self) -> int:
        """Blocks entered in this generation, dead ones included."""
        return self._count

    def holds(self, run: Run) -> bool:
        """Whether the index still knows all of a run."""
        segment = run.segment
        return self._segments.get(segment.number) is segment and run.offset + run.length <= segment.end

    def sweep(
        self,
        namespace: Hashable,
        prompt: Tokens,
        windows: npt.NDArray[np.uint64],
        start: int,
        shortest: int,
        held: Held | None,
    ) -> list[Run]:
        """Disjoint runs of ``prompt[start:]``, from left to right.

        At the first position that is not covered yet and at which blocks of donors begin, the longest run of these
        donors is taken if it has ``shortest`` tokens and the tree still holds it; the sweep continues after it.

        Args:
            namespace: whose donors.
            prompt: int32 tokens.
            windows: :meth:`window_hashes` of it.
            start: first position that is looked at.
            shortest: tokens of the shortest run.
            held: asked once per donor that would be taken; what it no longer holds is forgotten. None: all is held.
        """
        self.steps += len(windows)
        heads = self._living_heads(windows)
        # A run of more than one block shows at its second block, too.
        if shortest > self.block + self._unit - self._page:
            following = np.append(heads[self.block :], np.full(min(self.block, len(heads)), -1, np.int32))
            heads = np.where(following >= 0, heads, -1)
        found = np.flatnonzero(heads >= 0)
        runs: list[Run] = []
        budget = _Budget(_STEPS_PER_BLOCK * (len(prompt) // self.block) + _SPARE_STEPS)
        sweep = _Sweep(namespace, prompt, windows, shortest, held, budget)
        at = int(np.searchsorted(found, start))
        while at < len(found) and budget.spend():
            position = int(found[at])
            run = self._take(sweep, position, int(heads[position]))
            if run is None:
                at += 1
                continue
            floor = runs[-1].end if runs else start
            run = self._to_line_ends(sweep, run, floor)
            # A line's own donor may have its first whole block a little later than another one that shares a part.
            for other_at in range(at + 1, min(at + 1 + self._ahead, len(found))):
                place = int(found[other_at])
                if run.start == floor or place >= position + self.block:
                    break
                other = self._take(sweep, place, int(heads[place]))
                other = other and self._to_line_ends(sweep, other, floor)
                if other is not None and other.start <= run.start and other.length > run.length:
                    run = other
            self._append(sweep, runs, run, start)
            at = int(np.searchsorted(found, runs[-1].end))
        self.steps += budget.spent
        self._compact()
        return runs

    def _living_heads(self, windows: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """The newest living block of each content, -1 if there is none; dead ones are taken out of the lists."""
        heads = self._by_content.get(windows, self._hash)
        hits = np.flatnonzero(heads >= 0)
        if self._live[heads[hits]].all():
            return heads
        first, inverse = np.unique(heads[hits], return_inverse=True)
        living = first.copy()
        for _ in range(_DEAD_ROUNDS):
            dead = np.flatnonzero(living >= 0)
            dead = dead[~self._live[living[dead]]]
            if not len(dead):
                break
            self.steps += len(dead)
            living[dead] = self._older[living[dead]]
        living[(living >= 0) & ~self._live[living]] = -1
        moved = living[(living >= 0) & (living != first)]
        if len(moved):
            self._by_content.put(self._hash[moved], moved, self._hash)
        heads[hits] = living[inverse]
        return heads

    def _take(self, sweep: _Sweep, position: int, block: int) -> Run | None:
        """The longest run at a position that the tree still holds; None if there is none that is long enough.

        Args:
            sweep: what is searched for.
            position: in the prompt.
            block: the newest living one with the content that begins there.
        """
        before = -1
        while block >= 0 and sweep.budget.left:
            runs: list[tuple[Run, int]] = []
            tried = 0
            while block >= 0 and tried < self.candidates and sweep.budget.spend():
                older, segment = int(self._older[block]), self._alive(block, sweep.namespace)
                if segment is not None:
                    tried += 1
                    runs.append((self._follow(sweep, position, block, segment), block))
                if self._live[block]:
                    before = block
                elif before >= 0:
                    self._older[before] = older
                block = older
            while runs:
                # Of equal ones the newest comes first.
                run, number = runs.pop(max(range(len(runs)), key=lambda i: runs[i][0].length))
                if run.length < sweep.shortest:
                    break
                # A donor may be here twice, and be forgotten for the first of its runs.
                if self.holds(run):
                    if run.offset + run.length <= sweep.held_length(run.segment):
                        return run
                    self._forget(run.segment, sweep.held_length(run.segment))
                segment = self._alive(number, sweep.namespace)
                if segment is not None and sweep.budget.spend():
                    # The tree lost the donor's end only.
                    runs.append((self._follow(sweep, position, number, segment), number))
        return None

    def _append(self, sweep: _Sweep, runs: list[Run], run: Run, start: int) -> None:
        """Add a run; the token that ends the line before it becomes its first, if that is the same in its donor.

        What comes later attends to the ends of lines. As the first row of a span, which drifts most, such a token is
        recomputed before others; as the last one it would hardly be.
        """
        before = run.segment.path(run.offset, max(run.offset - 1, 0))
        follows = bool(runs) and runs[-1].end == run.start
        free = run.start > start and (not follows or runs[-1].length > sweep.shortest)
        if free and len(before) and before[0] == sweep.prompt[run.start - 1] and self._ends_line(before)[0]:
            if follows:
                last = runs[-1]
                runs[-1] = Run(last.start, last.length - 1, last.segment, last.offset)
            run = Run(run.start - 1, run.length + 1, run.segment, run.offset - 1)
        runs.append(run)

    def _to_line_ends(self, sweep: _Sweep, run: Run, floor: int) -> Run:
        """Extend a run by less than a block to each side, if the donor's line begins or ends there.

        At a donor's end, where the last block belongs to what is after it, by that block, too.

        Args:
            sweep: what is searched for.
            run: of whole blocks.
            floor: where it may begin at the earliest.
        """
        segment, prompt, reach = run.segment, sweep.prompt, self.block - 1
        path = segment.path(min(run.offset + run.length + reach + self.block, sweep.held_length(segment)))
        before = path[max(run.offset - reach, 0) : run.offset]
        begin = run.start - min(len(before), run.start - floor)
        same = _common_prefix(before[::-1], prompt[begin : run.start][::-1])
        after = path[run.offset + run.length :]
        common = _common_prefix(after, prompt[run.end :])
        # A line begins after the token that ends the one before, or with the path.
        starts = np.flatnonzero(self._ends_line(path[max(run.offset - same - 1, 0) : run.offset]))
        ends = np.flatnonzero(self._ends_line(after[:common]))
        left = 0
        if run.offset == same:
            left = same
        elif len(starts):
            left = min(same, same - int(starts[0]))
        right = int(ends[-1]) + 1 if len(ends) else 0
        return Run(run.start - left, left + run.length + right, segment, run.offset - left)

    def _ends_line(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        known = (tokens >= 0) & (tokens < len(self._line_ends))
        return known & self._line_ends[np.where(known, tokens, 0)]

    def _follow(self, sweep: _Sweep, position: int, number: int, segment: Segment) -> Run:
        """The run of whole blocks that begins at a position of the prompt and with a block of a segment."""
        block, prompt, windows = self.block, sweep.prompt, sweep.windows
        offset = end = segment.begin + int(self._ordinal[number]) * block
        shift = position - offset
        while True:
            whole = self._whole_end(segment)
            same = _common_prefix(segment.tokens[end - segment.begin : whole - segment.begin], prompt[end + shift :])
            end += same // block * block
            # Other donors branch off at whole units.
            branch = end - end % self._unit
            first = windows[branch + shift : branch + shift + self._unit : block].tobytes()
            child = segment.children.get((branch, first))
            if child is None or not _starts_with(prompt[branch + shift :], child.tokens[: self._unit]):
                break
            if not sweep.budget.spend():
                break
            segment, end = child, branch
        rest = segment.tokens[end - segment.begin :]
        if end == whole and len(rest):
            if _starts_with(prompt[end + shift :], rest):
                end = segment.end
            elif not any(begin == end for begin, _ in segment.children):
                end -= block  # The last block is matched with the tokens after it, or not at all.
        return Run(position, max(end - offset, 0), segment, offset)


class PromptSearch:
    """One prompt's search, which is repeated only if what it found is gone, or something relevant was indexed.

    Args:
        index: where to look.
        namespace: of the prompt.
        prompt: int32 tokens.
    """

    def __init__(self, index: AnyPositionIndex, namespace: Hashable, prompt: Tokens) -> None:
        self._index, self._namespace, self._prompt = index, namespace, prompt
        self._runs: list[Run] = []
        # What was searched for, and which blocks the index had by then.
        self._start, self._shortest, self._generation, self._count = 0, 0, -1, 0
        self._uncovered: npt.NDArray[np.uint64] | None = None
        self.searches = 0
        """How often the index was searched."""

    def runs(self, start: int, min_span: int | None = None, held: Held | None = None) -> list[Run]:
        """Disjoint runs of the prompt from ``start`` on, by their place in the prompt.

        Args:
            start: tokens that come from elsewhere, usually an exact prefix.
            min_span: tokens of the shortest run; not below the index's.
            held: see :meth:`AnyPositionIndex.sweep`.
        """
        index = self._index
        shortest = max(min_span or index.min_span, index.min_span)
        if len(self._prompt) - start < shortest:
            return []
        if self._outdated(start, shortest):
            windows = index.window_hashes(self._namespace, self._prompt)
            self._runs = index.sweep(self._namespace, self._prompt, windows, start, shortest, held)
            self._start, self._shortest, self._uncovered = start, shortest, None
            self._generation, self._count = index.generation, index.count
            self.searches += 1
        return list(_from(self._runs, start, shortest))

    def _outdated(self, start: int, shortest: int) -> bool:
        index = self._index
        if self._generation != index.generation or self._shortest != shortest or start < self._start:
            return True
        if not all(index.holds(run) for run in self._runs):
            return True
        new = index.indexed_since(self._count)
        if not len(new):
            return False
        self._count += len(new)
        if self._uncovered is None:
            self._uncovered = self._hash_uncovered()
        if not len(self._uncovered):
            return False
        place = np.searchsorted(self._uncovered, new).clip(max=len(self._uncovered) - 1)
        return bool((self._uncovered[place] == new).any())

    def _hash_uncovered(self) -> npt.NDArray[np.uint64]:
        """Hashes, ascending, of the windows that are not within what was found or comes from elsewhere."""
        windows = self._index.window_hashes(self._namespace, self._prompt)
        wanted = np.ones(len(windows), np.bool_)
        wanted[: self._start] = False
        for run in self._runs:
            wanted[run.start : run.end - self._index.block + 1] = False
        return np.unique(windows[wanted])


def beside(runs: Sequence[Run], others: Iterable[Run], shortest: int) -> list[Run]:
    """Disjoint runs, and what other runs cover between them, all by their place in the prompt.

    Args:
        runs: by place.
        others: are cut to what ``runs`` leave, and left out if that is less than ``shortest`` tokens.
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


def _from(runs: Iterable[Run], start: int, shortest: int) -> Iterable[Run]:
    """Runs from a position on, without what became too short."""
    for run in runs:
        cut = max(start - run.start, 0)
        if run.length - cut >= shortest:
            yield Run(run.start + cut, run.length - cut, run.segment, run.offset + cut)


@dataclass(slots=True)
class _Sweep:
    """One search of a prompt; see :meth:`AnyPositionIndex.sweep`."""

    namespace: Hashable
    prompt: Tokens
    windows: npt.NDArray[np.uint64]
    shortest: int
    held: Held | None
    budget: _Budget
    _lengths: dict[Segment, int] = field(default_factory=dict)

    def held_length(self, segment: Segment) -> int:
        """How many tokens of a segment's path the tree still holds; asked once."""
        if self.held is None:
            return segment.end
        if segment not in self._lengths:
            self._lengths[segment] = self.held(segment)
        return self._lengths[segment]


class _Budget:
    """Steps that one search may take."""

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


def _common_prefix(a: Tokens, b: Tokens) -> int:
    n = min(len(a), len(b))
    if not n:
        return 0
    differ = a[:n] != b[:n]
    first = int(differ.argmax())
    return first if differ[first] else n


def _starts_with(tokens: Tokens, beginning: Tokens) -> bool:
    return len(tokens) >= len(beginning) and bool((tokens[: len(beginning)] == beginning).all())


def beginning_hashes(seed: Hashable, items: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash of each beginning of a sequence, from the empty one to the whole; uint64 (n,) -> (n + 1,).

    Sums of the items, each mixed with its place, so that the order counts.
    """
    with np.errstate(over="ignore"):
        place = np.arange(1, len(items) + 1, dtype=_U64) * _MULTIPLIER
        sums = np.cumsum(_mix(items ^ place), dtype=_U64)
        return _mix(np.append(_U64(0), sums) + _hash(seed))


def _hash(value: Hashable) -> np.uint64:
    return _U64(hash(value) & 0xFFFFFFFFFFFFFFFF)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
        return x ^ (x >> _U64(31))
