"""Any-position index: which spans of a prompt are anywhere in the radix tree.

The index knows tokens only. A *donor* is a path of the radix tree. Its tokens are cut into *hash blocks* of ``block``
tokens, counted from the root; "block" means these throughout :mod:`a3_sglang.matching`, never a page of the KV pool.
The hash of every window of a prompt (stride 1) is looked up, so a donor's block is found at any position of the
prompt. Each hit is compared token by token, so a hash collision costs time only, and followed block by block.

A span consists of whole blocks of one donor. It is never extended token by token: if it were, a client could read
other clients' prompts by guessing one token at a time. A guess has to be right about a whole block at once. A
span may also begin or end with a line of the donor, as documents usually do.

Donors that share a prefix share its blocks, as they share its KV in the tree: the index is a trie of segments, each
with only the tokens that no earlier donor has. A segment begins at a multiple of the *unit*, the smallest number of
tokens that is both whole blocks and whole pages, and may end at any page. The tokens after a segment's last unit have
no hash of their own; they are matched together with the block before them, all or nothing, so that a donor can be
reused to its end.

The index stores no KV slots. Its owner looks them up in the tree by the path's tokens when a span is used; if the tree
no longer has them, :meth:`AnyPositionIndex.forget` drops them here. :mod:`a3_sglang.matching.search` searches it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from a3_sglang.matching.blocks import BlockStore
from a3_sglang.matching.hashing import BlockHasher, Hashes, beginning_hashes
from a3_sglang.matching.segment import Ids, Segment, Tokens, starts_with
from a3_sglang.matching.span import Span


class AnyPositionIndex:
    """The donors, by the contents of their blocks.

    Args:
        min_span: length of the shortest span that is found, in tokens; blocks are half as long.
        capacity: indexed tokens above which the least recently used donors are forgotten (None: no bound). The radix
            tree does not notify the index of evictions; twice the tree's size keeps all that can still be there.
        candidates: how many donors of one block are compared, newest first.
        page_size: tokens per page of the KV pool.
        line_ends: bool (vocabulary,), the tokens that end a line; None: spans ignore lines.

    Attributes:
        block: tokens per block.
        unit: tokens per unit, whole blocks and whole pages.
        blocks: the blocks of all segments.
        steps: work of all searches so far: windows hashed, and steps of :class:`a3_sglang.matching.sweep.Sweep`.
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
        self.page_size = page_size
        self.unit = math.lcm(self.block, page_size)
        self.capacity = capacity
        self.candidates = candidates
        self.line_ends = np.zeros(1, np.bool_) if line_ends is None else line_ends
        self.hasher = BlockHasher(self.block)
        self.blocks = BlockStore()
        self.steps = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._roots: dict[tuple[Hashable, Hashable], Segment] = {}
        # Segments by number, least recently used first.
        self._segments: OrderedDict[int, Segment] = OrderedDict()
        self._next_number = 0
        self._tokens = 0
        self.blocks.clear()

    def __len__(self) -> int:
        """Indexed tokens; those of a prefix that donors share count once."""
        return self._tokens

    # ---- donors

    def add(self, namespace: Hashable, tokens: Ids, mark: Hashable = None) -> None:
        """Make a path of the tree a donor. Known leading blocks are not stored again.

        Args:
            namespace: of the tokens; searches of other namespaces do not find them.
            tokens: of the path, from the root.
            mark: distinguishes paths of the same tokens for the index's owner. Searches find donors of all marks.
        """
        path, content, chain = self._path_hashes(namespace, tokens, mark)
        if not len(content):
            return
        segment, known = self._longest_known(namespace, mark, path, chain)
        known -= known % (self.unit // self.block)
        if known < len(content):
            first = content[known : known + self.unit // self.block].tobytes()
            segment = self._grow(namespace, mark, segment, path, known * self.block, first)
            self._index_blocks(segment, content[known:], chain[known:])
        assert segment is not None
        self.touch(segment)
        while self.capacity is not None and self._tokens > self.capacity and len(self._segments) > 1:
            self._cut(next(iter(self._segments.values())), 0)
        self.compact()

    def known_prefix(self, namespace: Hashable, tokens: Ids) -> int:
        """How many of a prompt's first tokens are also a donor's first tokens, in whole units."""
        path, _, chain = self._path_hashes(namespace, tokens, None)
        _, known = self._longest_known(namespace, None, path, chain)
        return known * self.block // self.unit * self.unit

    def touch(self, segment: Segment) -> None:
        """Note that a donor was used, so that it is forgotten later than others."""
        node: Segment | None = segment
        # Parents last: a prefix is used whenever one of its continuations is.
        while node is not None and node.number in self._segments:
            self._segments.move_to_end(node.number)
            node = node.parent

    def forget(self, segment: Segment, keep: int) -> None:
        """The tree holds only the first ``keep`` tokens of this segment's path: drop what follows them."""
        self.drop(segment, keep)
        self.compact()

    def drop(self, segment: Segment, keep: int) -> None:
        """Like :meth:`forget`, but block numbers stay valid; :meth:`compact` has to follow."""
        # The tokens after the last whole unit are matched as a donor's end, which this path has lost.
        keep -= keep % self.unit
        node = segment
        while node.parent is not None and keep < node.end:
            parent = node.parent
            self._cut(node, max(keep - node.begin, 0))
            if keep >= node.begin:
                break
            node = parent

    def compact(self) -> None:
        """Renumber the living blocks without the dead ones, once these are the majority."""
        if not self.blocks.mostly_dead:
            return
        content, chain = self.blocks.content, self.blocks.chain
        self.blocks.clear()
        for segment in self._segments.values():
            kept = np.concatenate([np.arange(0), *(np.arange(first, first + n) for first, n in segment.blocks)])
            segment.blocks = []
            self._index_blocks(segment, content[kept], chain[kept])

    # ---- what a search asks

    def segment_of(self, block: int, namespace: Hashable) -> Segment | None:
        """The segment of a block; None if the block is dead or of another namespace."""
        if not self.blocks.live[block]:
            return None
        segment = self._segments[int(self.blocks.owner[block])]
        return segment if segment.namespace == namespace else None

    def whole_end(self, segment: Segment) -> int:
        """The end of a segment's last whole unit, as a position in its path."""
        return segment.begin + len(segment.tokens) // self.unit * self.unit

    def holds(self, span: Span) -> bool:
        """Whether the index still holds all of a span."""
        segment = span.segment
        return self._segments.get(segment.number) is segment and span.donor_end <= segment.end

    # ---- the trie

    def _path_hashes(self, namespace: Hashable, tokens: Ids, mark: Hashable) -> tuple[Tokens, Hashes, Hashes]:
        """The whole pages at a path's beginning; the content and chain hashes of the blocks of its whole units."""
        path = np.asarray(tokens, np.int32)[: len(tokens) // self.page_size * self.page_size]
        whole = path[: self._blocks_in(len(path)) * self.block]
        content = self.hasher.block_hashes(namespace, whole.reshape(-1, self.block))
        return path, content, beginning_hashes(mark, content)[1:]

    def _longest_known(
        self, namespace: Hashable, mark: Hashable, path: Tokens, chain: Hashes
    ) -> tuple[Segment | None, int]:
        """The segment that holds the deepest known block of this path, and how many blocks are known."""
        blocks = self.blocks.with_chain(chain)
        for known in (np.flatnonzero(blocks >= 0) + 1)[::-1]:
            segment = self.segment_of(int(blocks[known - 1]), namespace)
            length = int(known) * self.block
            if segment is not None and segment.mark == mark and np.array_equal(segment.path(length), path[:length]):
                return segment, int(known)
        return None, 0

    def _grow(
        self,
        namespace: Hashable,
        mark: Hashable,
        segment: Segment | None,
        path: Tokens,
        begin: int,
        content: bytes,
    ) -> Segment:
        """Append ``path[begin:]`` to the segment that ends at ``begin``, or branch off a new segment there.

        Args:
            namespace: of the path.
            mark: of the path.
            segment: holds the tokens before ``begin``; None if no donor begins like this path.
            path: tokens, int32, whole pages.
            begin: a multiple of the unit.
            content: content hashes of the blocks of the unit at ``begin``.
        """
        while segment is not None and segment.parent is not None and begin == segment.begin:
            segment = segment.parent
        if segment is None:
            segment = self._roots.get((namespace, mark)) or Segment(
                namespace, None, 0, np.empty(0, np.int32), mark=mark
            )
        whole = self.whole_end(segment)
        if (
            segment.parent is None
            or begin < whole
            or not starts_with(path[begin:], segment.tokens[whole - segment.begin :])
        ):
            segment = self._branch_off(segment, begin, content)
        else:
            # The path continues this donor; tokens that did not fill a unit before are indexed with what follows.
            self._tokens -= segment.end - begin
            segment.tokens = segment.tokens[: begin - segment.begin]
        segment.tokens = np.concatenate([segment.tokens, path[begin:]])
        self._tokens += len(path) - begin
        return segment

    def _branch_off(self, parent: Segment, begin: int, content: bytes) -> Segment:
        """A new segment without tokens."""
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

    def _cut(self, segment: Segment, keep: int) -> None:
        """Cut a segment to its first ``keep`` tokens (whole units), and drop all that branches off after them."""
        pending = [(segment, keep)]
        while pending:
            node, keep = pending.pop()
            pending += [(child, 0) for child in node.children.values() if child.begin > node.begin + keep or not keep]
            self._tokens -= len(node.tokens) - keep
            node.tokens = node.tokens[:keep].copy()
            kept = self._blocks_in(keep)
            ranges, node.blocks = node.blocks, []
            for first, count in ranges:
                left = min(count, kept)
                self.blocks.kill(first + left, first + count)
                kept -= left
                if left:
                    node.blocks.append((first, left))
            if not keep:
                self._remove(node)

    def _remove(self, segment: Segment) -> None:
        """Remove a segment without tokens from the trie, and its root if that has no other child."""
        del self._segments[segment.number]
        parent = segment.parent
        assert parent is not None
        parent.children = {key: child for key, child in parent.children.items() if child is not segment}
        root = (parent.namespace, parent.mark)
        if parent.parent is None and not parent.children and self._roots.get(root) is parent:
            del self._roots[root]

    def _index_blocks(self, segment: Segment, content: Hashes, chain: Hashes) -> None:
        """Index blocks that follow those which the segment has already."""
        if len(content):
            ordinal = sum(count for _, count in segment.blocks)
            first = self.blocks.add(segment.number, ordinal, content, chain)
            segment.blocks.append((first, len(content)))

    def _blocks_in(self, tokens: int) -> int:
        """Number of blocks in the whole units of this many tokens."""
        return tokens // self.unit * self.unit // self.block
