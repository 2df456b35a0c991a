"""Turns fusion off after repeated failures, so that the server continues as stock SGLang."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

LIMIT = 3
"""Consecutive failures after which fusion is turned off."""


class CircuitBreaker:
    """Counts consecutive failures.

    Args:
        on_failure: called with the stage of each failure, for the metrics.
        on_open: called once, when fusion is turned off.

    Attributes:
        open: fusion is off.
    """

    def __init__(self, on_failure: Callable[[str], None], on_open: Callable[[], None]) -> None:
        self._on_failure, self._on_open = on_failure, on_open
        self._failures = 0
        self.open = False

    def failed(self, stage: str) -> None:
        """Log the exception that is being handled; after :data:`LIMIT` in a row, turn fusion off."""
        logger.exception("a3: %s failed", stage)
        self._on_failure(stage)
        self._failures += 1
        if self._failures >= LIMIT and not self.open:
            self.open = True
            logger.error(
                "a3: off after %d failures in a row; until the server is restarted, it serves requests as stock SGLang",
                LIMIT,
            )
            self._on_open()

    def succeeded(self) -> None:
        """End a series of failures."""
        self._failures = 0
