"""A lock with bounded waits: on a CPU, either images are decoded or the model computes.

The model's threads split each matrix product among all cores and wait for the slowest. Where one
core decodes a JPEG meanwhile, the other cores stand still for as long. On a GPU the lock is open.

Both sides wait only for a limited time, so that neither a huge image nor a long batch stops the
other side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

MAX_COMPUTE_WAIT = 0.03  # seconds that a batch waits for decoding: a huge image must not delay it
MAX_DECODE_WAIT = 0.25  # seconds that decoding waits for a batch: longer batches lose little by it


class ComputeLock:
    """A lock between decoding, by many threads at once, and computing, by one."""

    def __init__(self, *, is_open: bool = False) -> None:
        """Make a lock.

        Args:
            is_open: True if nothing waits, because decoding and computing do not share cores.
        """
        self.is_open = is_open
        self._changed = threading.Condition()
        self._num_decoding, self._computing = 0, False

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Hold the lock while an image is decoded; other threads may decode too.

        Yields:
            None, after the running batch or after MAX_DECODE_WAIT.
        """
        if self.is_open:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._computing, MAX_DECODE_WAIT)
            self._num_decoding += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_decoding -= 1
                if not self._num_decoding:
                    self._changed.notify_all()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Hold the lock while a batch is computed.

        Yields:
            None, after the images in decoding or after MAX_COMPUTE_WAIT.
        """
        if self.is_open:
            yield
            return
        with self._changed:
            # Set before the wait: from now on no further image starts to decode.
            self._computing = True
            self._changed.wait_for(lambda: not self._num_decoding, MAX_COMPUTE_WAIT)
        try:
            yield
        finally:
            with self._changed:
                self._computing = False
                self._changed.notify_all()
