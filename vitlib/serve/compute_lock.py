"""ComputeLock: on a CPU, images are read or the model computes, but not both at once.

The model's threads divide each product among all cores and wait for the slowest: where a core is
busy with a JPEG meanwhile, the others stand still for as long. On a GPU nobody waits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

MODEL_WAITS = 0.03  # seconds, for images that are being read: a huge one must not hold up others
READERS_WAIT = (
    0.25  # seconds, for a batch: one that takes longer loses little by an image beside it
)


class ComputeLock:
    """Who computes. `shared`: nobody waits."""

    def __init__(self, *, shared: bool = False) -> None:
        self.shared = shared
        self._changed = threading.Condition()
        self._reading, self._computing = 0, False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """An image is read."""
        if self.shared:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._computing, READERS_WAIT)
            self._reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1
                if not self._reading:
                    self._changed.notify_all()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A batch is computed."""
        if self.shared:
            yield
            return
        with self._changed:
            self._computing = True
            self._changed.wait_for(lambda: not self._reading, MODEL_WAITS)
        try:
            yield
        finally:
            with self._changed:
                self._computing = False
                self._changed.notify_all()
