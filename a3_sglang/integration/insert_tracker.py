"""Tracks the request for which SGLang's tree inserts KV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from a3_sglang.integration.compat import TreeBase


class InsertTracker(TreeBase):
    """Mixin in front of SGLang's tree class that knows the request on whose behalf ``insert`` is called.

    SGLang 0.5.23 calls ``checkpoint`` and ``insert_req``; earlier releases call ``cache_unfinished_req`` and
    ``cache_finished_req``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._inserting: Any = None
        super().__init__(*args, **kwargs)

    @contextmanager
    def inserting(self, req: Any) -> Iterator[None]:
        """A context in which the tree inserts KV that this request has computed."""
        before, self._inserting = self._inserting, req
        try:
            yield
        finally:
            self._inserting = before

    def checkpoint(self, req: Any, **kwargs: Any) -> None:
        with self.inserting(req):
            super().checkpoint(req, **kwargs)

    def insert_req(self, req: Any, **kwargs: Any) -> None:
        with self.inserting(req):
            super().insert_req(req, **kwargs)

    def cache_unfinished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        with self.inserting(req):
            super().cache_unfinished_req(req, *args, **kwargs)

    def cache_finished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        with self.inserting(req):
            super().cache_finished_req(req, *args, **kwargs)
