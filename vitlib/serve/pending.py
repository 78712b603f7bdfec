"""A request that is being answered: rows by several threads, one result for the event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from vitlib.serve.core import DEFAULT_EXPLANATION, Kind
from vitlib.serve.errors import shutdown_error
from vitlib.serve.explanation import Explanation


class PendingRequest:
    """A request that is being answered, with a place for the row of each image.

    Attributes:
        kind: The result to compute.
        explanation: The map of "attend".
        deadline: time.monotonic() after which its images are not computed any more.
        future: The rows, or an error of the whole request.
        is_cancelled: True once the result is not needed any more.
    """

    def __init__(
        self,
        kind: Kind,
        loop: asyncio.AbstractEventLoop,
        deadline: float,
        explanation: Explanation = DEFAULT_EXPLANATION,
    ) -> None:
        """Make a request without images.

        Args:
            kind: The result to compute.
            loop: The event loop that awaits the result.
            deadline: time.monotonic() after which its images are not computed any more.
            explanation: The map of "attend".
        """
        self.explanation = explanation
        self.kind, self.loop, self.deadline = kind, loop, deadline
        self.future: asyncio.Future[list[Any]] = loop.create_future()
        self.is_cancelled = False
        self._rows: list[Any] = []
        self._num_missing = 0
        self._lock = threading.Lock()

    def expect(self, count: int) -> None:
        """Set the number of images, before any row is set.

        Args:
            count: The number of images.
        """
        self._rows, self._num_missing = [None] * count, count

    def set_row(self, index: int, row: Any) -> None:
        """Set the row of an image; in any thread. The last row completes the request.

        Args:
            index: The image.
            row: Its row, or an Exception.
        """
        with self._lock:
            self._rows[index] = row
            self._num_missing -= 1
            is_complete = self._num_missing == 0
        if is_complete:
            self.set_result(self._rows)

    def set_result(self, result: Any) -> None:
        """Complete the request; in any thread.

        Args:
            result: The rows, or an Exception for the whole request.
        """
        self.loop.call_soon_threadsafe(self._set_result, result)

    def abort(self) -> None:
        """Answer 503; in the event loop's thread."""
        self.is_cancelled = True
        self._set_result(shutdown_error())

    def _set_result(self, result: Any) -> None:
        """Complete the future, unless it was completed or cancelled before."""
        if self.future.done():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)
