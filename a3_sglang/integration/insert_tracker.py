"""For which request SGLang's tree inserts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class InsertTracker:
    """Mixin in front of SGLang's tree class that knows on whose behalf :meth:`insert` is called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._inserting: Any = None
        super().__init__(*args, **kwargs)

    @contextmanager
    def inserting(self, req: Any) -> Iterator[None]:
        """While the tree inserts what a request computed."""
        before, self._inserting = self._inserting, req
        try:
            yield
        finally:
            self._inserting = before

    def checkpoint(self, req: Any, **kwargs: Any) -> None:
        with self.inserting(req):
            super().checkpoint(req, **kwargs)  # type: ignore[misc]

    def insert_req(self, req: Any, **kwargs: Any) -> None:
        with self.inserting(req):
            super().insert_req(req, **kwargs)  # type: ignore[misc]

    def cache_unfinished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        with self.inserting(req):
            super().cache_unfinished_req(req, *args, **kwargs)  # type: ignore[misc]

    def cache_finished_req(self, req: Any, *args: Any, **kwargs: Any) -> None:
        with self.inserting(req):
            super().cache_finished_req(req, *args, **kwargs)  # type: ignore[misc]
