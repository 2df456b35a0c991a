"""Any-position index: which runs of a prompt stand somewhere in the radix tree, wherever they stood there.

The index knows tokens only. A *donor* is a path of the radix tree; its tokens are cut into blocks of
``block`` tokens, counted from the root. Every run of at least ``2 * block - 1`` equal tokens contains one
whole block of its donor, so looking up the hash of every window of the prompt (stride 1) finds every such
run. A hit is compared token by token and extended to both sides, so a hash collision costs time and nothing
else. Donors that share a prefix share its blocks, as they share its KV in the tree: the index is a trie of
segments, each holding only what no earlier donor had. Segments begin where whole blocks and whole pages of the
tree (*units*) do, and may end at any page: the tokens behind a path's last unit have no hash of their own, but a run
that reaches them goes on through them.

An entry does not hold slots. Its owner asks the tree for them (by the path's tokens) when a run is used; where
the tree no longer has them, :meth:`AnyPositionIndex.forget` drops the entries.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
_U64 = np.uint64
_MULTIPLIER = _U64(0x9E3779B97F4A7C15)
# Bounds the time of one lookup on repetitive prompts (a run of one token meets itself everywhere).
_MAX_COMPARED = 4096


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
    """The part of a donor's path that starts where it leaves its parent, in whole pages."""

    namespace: Hashable
    parent: Segment | None
    begin: int
    tokens: Tokens
    children: list[Segment] = field(default_factory=list)
    number: int = -1

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)

    def path(self, length: int) -> Tokens:
        """The first ``length`` tokens of the path, int32."""
        parts: list[Tokens] = []
        node: Segment | None = self
        while node is not None:
            parts.append(node.tokens[: max(length - node.begin, 0)])
            length = min(length, node.begin)
            node = node.parent
        return np.concatenate(parts[::-1])


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
        min_span: shortest run that :meth:`find` must find.
        capacity: indexed tokens above which the donors used longest ago are forgotten (None: no bound). The
            radix tree evicts without telling; twice its size keeps all that can still be there.
        candidates: how many donors with the same block are compared, newest first.
        page_size: the tree's.
    """

    def __init__(
        self, min_span: int = 32, capacity: int | None = None, candidates: int = 16, page_size: int = 1
    ) -> None:
        if min_span < 1:
            raise ValueError(f"min_span must be at least 1, not {min_span}")
        self.min_span = min_span
        self.block = (min_span + 1) // 2
        self._page = page_size
        self._unit = math.lcm(self.block, page_size)
        self.capacity = capacity
        self.candidates = candidates
        self.version = 0
        powers = np.empty(self.block, _U64)
        powers[0] = 1
        with np.errstate(over="ignore"):
            for i in range(1, self.block):
                powers[i] = powers[i - 1] * _MULTIPLIER
        self._powers = powers
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._roots: dict[Hashable, Segment] = {}
        # Segments by number; insertion order of the dict is the order of last use.
        self._segments: OrderedDict[int, Segment] = OrderedDict()
        self._next_number = 0
        self._tokens = 0
        self._clear_blocks()
        self.version += 1

    def _clear_blocks(self) -> None:
        self._hash, self._chain = np.zeros(64, _U64), np.zeros(64, _U64)
        self._owner, self._ordinal, self._older = (np.zeros(64, np.int32) for _ in range(3))
        self._count = self._dead = 0
        self._by_content, self._by_path = _BlockTable(), _BlockTable()

    def __len__(self) -> int:
        """Indexed tokens; those of a prefix that donors share count once."""
        return self._tokens

    @property
    def nbytes(self) -> int:
        """Bytes held by tokens, hashes and tables (segments' own objects: under 1 KiB each)."""
        arrays = (self._hash, self._chain, self._owner, self._ordinal, self._older)
        tokens = sum(s.tokens.nbytes for s in self._segments.values())
        return tokens + sum(a.nbytes for a in arrays) + self._by_content.nbytes + self._by_path.nbytes

    # ---- donors

    def add(self, namespace: Hashable, tokens: Sequence[int] | Tokens) -> None:
        """Make a path of the tree a donor. Known leading blocks are not stored again."""
        path, content, chain = self._path_hashes(namespace, tokens)
        if not len(content):
            return
        segment, known = self._longest_known(namespace, path, chain)
        known -= known % (self._unit // self.block)
        begin = known * self.block
        if known < len(content) or self._extend_right(path, segment, 0, begin)[1] < len(path):
            while segment.parent is not None and begin == segment.begin:
                segment = segment.parent
            if segment.parent is None or begin < segment.end:
                segment = self._new_segment(namespace, segment, begin)
            segment.tokens = np.concatenate([segment.tokens, path[begin:]])
            self._tokens += len(path) - begin
            self._index_blocks(segment, begin - segment.begin, content[known:], chain[known:])
            self.version += 1
        self._touch(segment)
        while self.capacity is not None and self._tokens > self.capacity and len(self._segments) > 1:
            self._drop(next(iter(self._segments.values())), 0)

    def known_prefix(self, namespace: Hashable, tokens: Sequence[int] | Tokens) -> int:
        """How many of a prompt's first tokens are a donor's first tokens too, in whole blocks and pages."""
        path, _, chain = self._path_hashes(namespace, tokens)
        _, known = self._longest_known(namespace, path, chain)
        return known * self.block // self._unit * self._unit

    def forget(self, segment: Segment, keep: int) -> None:
        """The tree holds only the first ``keep`` tokens of this segment's path: drop what lies behind."""
        node = segment
        while node.parent is not None and keep < node.end:
            self._drop(node, max(keep - node.begin, 0))
            if keep >= node.begin:
                break
            node = node.parent

    def _new_segment(self, namespace: Hashable, parent: Segment, begin: int) -> Segment:
        segment = Segment(namespace, parent, begin, np.empty(0, np.int32), number=self._next_number)
        self._next_number += 1
        self._segments[segment.number] = segment
        parent.children.append(segment)
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

    def _drop(self, segment: Segment, keep: int) -> None:
        """Cut a segment to its first ``keep`` tokens (whole pages), with all that branches off behind."""
        keep -= keep % self._page
        for child in [c for c in segment.children if c.begin > segment.begin + keep]:
            self._drop(child, 0)
        self._dead += self._blocks_in(len(segment.tokens)) - self._blocks_in(keep)
        self._tokens -= len(segment.tokens) - keep
        segment.tokens = segment.tokens[:keep].copy()
        if not keep:
            del self._segments[segment.number]
            assert segment.parent is not None
            segment.parent.children.remove(segment)
        self.version += 1
        if self._dead > 1024 and self._dead * 2 > self._count:
            self._rebuild()

    # ---- blocks

    def _index_blocks(
        self, segment: Segment, begin: int, content: npt.NDArray[np.uint64], chain: npt.NDArray[np.uint64]
    ) -> None:
        """Enter the blocks of a segment from its token ``begin`` on."""
        n = len(content)
        if not n:
            return
        first = self._count
        self._reserve(first + n)
        new = np.arange(first, first + n, dtype=np.int32)
        self._hash[first : first + n] = content
        self._chain[first : first + n] = chain
        self._owner[first : first + n] = segment.number
        self._ordinal[first : first + n] = begin // self.block + np.arange(n)
        self._count += n
        # Blocks with equal content form a list, newest first; equal ones within this batch follow each other.
        self._older[first : first + n] = self._by_content.get(content, self._hash)
        order = np.argsort(content, kind="stable")
        same_as_next = content[order[:-1]] == content[order[1:]]
        self._older[new[order[1:][same_as_next]]] = new[order[:-1][same_as_next]]
        newest = np.append(~same_as_next, True)
        heads = new[order[newest]]
        self._by_content.put(self._hash[heads], heads, self._hash)
        self._by_path.put(chain, new, self._chain)

    def _reserve(self, n: int) -> None:
        if n <= len(self._hash):
            return
        size = max(n, len(self._hash) * 5 // 4)
        for name in ("_hash", "_chain", "_owner", "_ordinal", "_older"):
            old = getattr(self, name)
            grown = np.zeros(size, old.dtype)
            grown[: self._count] = old[: self._count]
            setattr(self, name, grown)

    def _rebuild(self) -> None:
        """Leave the dead blocks behind."""
        segments = list(self._segments.values())
        owner, ordinal = self._owner[: self._count], self._ordinal[: self._count]
        by_owner: dict[int, npt.NDArray[np.int64]] = {}
        order = np.lexsort((ordinal, owner))
        cuts = np.flatnonzero(np.diff(owner[order])) + 1
        for group in np.split(order, cuts):
            by_owner[int(owner[group[0]])] = group
        hashes, chains = self._hash, self._chain
        self._clear_blocks()
        for segment in segments:
            kept = by_owner.get(segment.number, order[:0])[: self._blocks_in(len(segment.tokens))]
            self._index_blocks(segment, 0, hashes[kept], chains[kept])

    def _path_hashes(
        self, namespace: Hashable, tokens: Sequence[int] | Tokens
    ) -> tuple[Tokens, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """The whole pages at a path's beginning; the content and chain hashes of the blocks of its whole units."""
        path = np.asarray(tokens, np.int32)[: len(tokens) // self._page * self._page]
        whole = path[: self._blocks_in(len(path)) * self.block]
        content = self._block_hashes(whole.reshape(-1, self.block), namespace)
        return path, content, self._chain_hashes(content)

    def _blocks_in(self, tokens: int) -> int:
        """Blocks of the whole units among so many tokens."""
        return tokens // self._unit * self._unit // self.block

    def _block_hashes(self, windows: npt.NDArray[np.int32], namespace: Hashable) -> npt.NDArray[np.uint64]:
        """Polynomial hashes of windows of ``block`` tokens, shape (n, block) -> (n,)."""
        with np.errstate(over="ignore"):
            value = np.full(len(windows), _U64(hash(namespace) & 0xFFFFFFFFFFFFFFFF), _U64)
            for j in range(self.block):
                value += (windows[:, j].astype(_U64) + _U64(1)) * self._powers[j]
            return _mix(value)

    @staticmethod
    def _chain_hashes(content: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Hash of all blocks up to each one: sums of the blocks' hashes, each mixed with its place."""
        with np.errstate(over="ignore"):
            place = np.arange(1, len(content) + 1, dtype=_U64) * _MULTIPLIER
            return _mix(np.cumsum(_mix(content ^ place), dtype=_U64))

    def _longest_known(self, namespace: Hashable, path: Tokens, chain: npt.NDArray[np.uint64]) -> tuple[Segment, int]:
        """The segment that holds the deepest known block of this path, and how many blocks are known."""
        blocks = self._by_path.get(chain, self._chain)
        for known in range(len(chain), 0, -1):
            if blocks[known - 1] < 0:
                continue
            segment = self._alive(int(blocks[known - 1]), namespace)
            if segment is not None and np.array_equal(segment.path(known * self.block), path[: known * self.block]):
                return segment, known
        return self._roots.setdefault(namespace, Segment(namespace, None, 0, np.empty(0, np.int32))), 0

    def _alive(self, block: int, namespace: Hashable) -> Segment | None:
        segment = self._segments.get(int(self._owner[block]))
        if segment is None or segment.namespace != namespace:
            return None
        return segment if self._ordinal[block] < self._blocks_in(len(segment.tokens)) else None

    # ---- lookup

    def find(
        self, namespace: Hashable, tokens: Sequence[int] | Tokens, start: int = 0, min_span: int | None = None
    ) -> list[Run]:
        """Disjoint runs of ``tokens[start:]`` that donors hold, by their place in the prompt.

        The longest run is taken first; what it covers is cut out of the others, and what is left of them counts
        while it is at least ``min_span`` long.
        """
        prompt = np.asarray(tokens, np.int32)
        shortest = max(min_span or self.min_span, self.min_span)
        if len(prompt) - start < shortest or not self._count:
            return []
        return select_runs(self.matches(namespace, prompt, start), shortest)

    def matches(self, namespace: Hashable, prompt: Tokens, start: int = 0) -> list[Run]:
        """Every maximal run, overlaps included, that reaches at least one whole block of a donor."""
        windows = np.lib.stride_tricks.sliding_window_view(prompt[start:], self.block)
        heads = self._by_content.get(self._block_hashes(windows, namespace), self._hash)
        runs: list[Run] = []
        # (segment, offset - position) -> end of the run already found on this diagonal.
        covered: dict[tuple[int, int], int] = {}
        compared = 0
        for i in np.flatnonzero(heads >= 0):
            position = start + int(i)
            block, tried = int(heads[i]), 0
            while block >= 0 and tried < self.candidates:
                segment = self._alive(block, namespace)
                if segment is not None:
                    tried += 1
                    offset = segment.begin + int(self._ordinal[block]) * self.block
                    if covered.get((segment.number, offset - position), -1) < position + self.block:
                        compared += 1
                        run = self._extend(prompt, start, position, segment, offset)
                        if run is not None:
                            runs.append(run)
                            node: Segment | None = run.segment
                            while node is not None and node.number >= 0:
                                covered[node.number, offset - position] = run.end
                                node = node.parent
                block = int(self._older[block])
            if compared >= _MAX_COMPARED:
                break
        return runs

    def _extend(self, prompt: Tokens, start: int, position: int, segment: Segment, offset: int) -> Run | None:
        """The longest run through the block at ``offset`` of this segment's path."""
        at = offset - segment.begin
        if not np.array_equal(segment.tokens[at : at + self.block], prompt[position : position + self.block]):
            return None
        left = 0
        node: Segment | None = segment
        while node is not None:
            upto = offset - left - node.begin
            room = min(upto, position - left - start)
            same = _common_suffix(node.tokens[upto - room : upto], prompt[position - left - room : position - left])
            left += same
            if same < upto:
                break
            node = node.parent
        leaf, length = self._extend_right(prompt[position:], segment, offset, self.block)
        return Run(position - left, left + length, leaf, offset - left)

    def _extend_right(self, prompt: Tokens, segment: Segment, offset: int, length: int) -> tuple[Segment, int]:
        """The segment that agrees longest with ``prompt`` from ``offset`` on, and how long; ``length`` is known."""
        at = offset + length - segment.begin
        same = length + _common_prefix(segment.tokens[at:], prompt[length:])
        best = (segment, same)
        for child in segment.children:
            reach = child.begin - offset
            if length <= reach <= same and len(prompt) > reach and child.tokens[0] == prompt[reach]:
                other = self._extend_right(prompt, child, offset, reach)
                best = max(best, other, key=lambda found: found[1])
        return best


def select_runs(runs: list[Run], shortest: int) -> list[Run]:
    """Disjoint runs, longest first (ties: the earlier one); overlaps are trimmed off the shorter runs."""
    number = itertools.count()
    heap = [(-run.length, run.start, next(number), run) for run in runs]
    heapq.heapify(heap)
    taken: list[Run] = []
    while heap and -heap[0][0] >= shortest:
        run = heapq.heappop(heap)[-1]
        at = bisect.bisect_left(taken, run.start, key=lambda t: t.end - 1)
        if at == len(taken) or taken[at].start >= run.end:
            taken.insert(at, run)
            continue
        for begin, end in ((run.start, taken[at].start), (taken[at].end, run.end)):
            if end - begin >= shortest:
                part = Run(begin, end - begin, run.segment, run.offset + begin - run.start)
                heapq.heappush(heap, (-part.length, part.start, next(number), part))
    return taken


def _common_prefix(a: Tokens, b: Tokens) -> int:
    n = min(len(a), len(b))
    if not n:
        return 0
    differ = a[:n] != b[:n]
    first = int(differ.argmax())
    return first if differ[first] else n


def _common_suffix(a: Tokens, b: Tokens) -> int:
    return _common_prefix(a[::-1], b[::-1])


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
        return x ^ (x >> _U64(31))
