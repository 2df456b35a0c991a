"""One run over the documents of files: which are sent, what is counted, when the KV pool is full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from a3_sglang.warm import Document, ServerError, ServerInfo, Warmed
from a3_sglang.warm.journal import Journal
from a3_sglang.warm.sources import InvalidSource, read

FULL = 0.9
"""Share of the KV pool that documents may fill; prompts and answers need room, too."""


class Run:
    """Warms documents, and counts them and their tokens.

    Args:
        send: :func:`a3_sglang.warm.warm` for one server and one beginning of prompts.
        info: of the server.
        journal: the documents that the server holds.
        evict: whether to continue when the KV pool is full.
        say: shows a message.

    Attributes:
        warmed: documents that were prefilled.
        skipped: documents that the server held already, and repeated ones.
        computed: tokens that were computed.
        tokens: tokens of the documents that the server holds now.
        failed: lines and documents that could not be warmed.
        full: whether the documents fill :data:`FULL` of the KV pool.
        left_out: whether documents were left out because the pool is full.
        failure: why the run ended early; None if it did not.

    Raises:
        ServerError: the server cannot be warmed.
    """

    def __init__(
        self,
        send: Callable[..., Iterator[Warmed]],
        info: ServerInfo,
        journal: Journal,
        evict: bool,
        say: Callable[[str], None],
    ) -> None:
        self.send, self.info, self.journal, self.evict, self.say = send, info, journal, evict, say
        self.warmed = self.skipped = self.computed = self.tokens = 0
        self.failed: list[InvalidSource] = []
        self.full = self.left_out = False
        self.failure: str | None = None
        self._seen: set[str] = set()
        self._checked = not len(journal)
        """Whether it is known if the server still holds what the journal lists."""
        template = next(send([Document("-")]))
        if template.error is not None:
            raise ServerError(template.error)
        self._template = template.tokens
        """Tokens of a request besides those of its document."""

    @property
    def kv_bytes(self) -> int | None:
        """Size of the documents' KV; None if the server does not report the size per token."""
        return None if self.info.token_bytes is None else round(self.tokens * self.info.token_bytes)

    @property
    def complete(self) -> bool:
        """Whether the server now holds every document of the sources."""
        return not self.failed and not self.left_out and self.failure is None

    def run(self, paths: list[Path], concurrency: int, rate: float | None, step: Callable[[], None]) -> None:
        """Warm the documents of files; ``step`` is called after each."""

        def missing() -> Iterator[Document]:
            for one in read(paths):
                if self.full and not self.evict:
                    self.left_out = True
                    return
                if isinstance(one, InvalidSource):
                    self._fail(one)
                elif not self._holds(one):
                    yield one
                    continue
                step()

        try:
            for one in self.send(missing(), concurrency=concurrency, rate=rate):
                self._add(one)
                step()
        except ServerError as error:
            self.failure = str(error)

    def _holds(self, document: Document) -> bool:
        """Whether a document need not be sent; the first one of an earlier run is sent to see if it is still cached."""
        key = self.journal.key(document)
        if key in self._seen:
            self.skipped += 1
            return True
        self._seen.add(key)
        known = self.journal.tokens(document)
        if known is None:
            return False
        if not self._checked:
            self._checked = True
            again = next(self.send([document]))
            lost = again.error is None and 2 * (again.cached - self._template) < again.tokens - self._template
            if lost:
                self.say("the server's cache was emptied since the last run; every document is warmed again")
                self.journal.forget()
            if lost or again.error is not None:
                self._add(again)
                return True
        self.skipped += 1
        self._count(known)
        return True

    def _add(self, one: Warmed) -> None:
        if one.error is not None:
            self._fail(InvalidSource(one.document.name, one.error))
            return
        # Only the template, which all share, was cached of a new document; of a known one, nearly everything was.
        tokens = one.tokens - min(one.cached, self._template)
        self.journal.add(one.document, tokens)
        self.warmed += 1
        self.computed += one.tokens - one.cached
        self._count(tokens)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self.full or self.info.slots is None or self.tokens < FULL * self.info.slots:
            return
        self.full = True
        self.say(
            f"the documents fill {self.tokens / self.info.slots:.0%} of the KV pool ({self.info.slots} tokens): "
            + ("further ones may evict earlier ones" if self.evict else "stopping; --evict continues")
        )

    def _fail(self, wrong: InvalidSource) -> None:
        self.failed.append(wrong)
        self.say(f"{wrong.place} skipped: {wrong.reason}")
