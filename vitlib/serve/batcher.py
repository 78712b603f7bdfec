"""Make batches of the images of many requests; one thread for each device computes them.

put() adds an image to the queue. A thread takes the oldest image and others like it, up to
max_batch, and runs the model. Then it calls `done` of each image with its row or with an error.

A batch starts as soon as max_batch images wait, or no further image is announced by reserve(), or
the oldest image has waited max_wait. So a single image starts at once, and of many that arrive
together none starts before the others are decoded and can join its batch.

A thread survives every error. The images of its batch get the error as their row, or all images in
the queue where it fails to take a batch. So no request waits for a thread that has ended.

Each thread makes its own model, and no other thread computes. Where two threads of a process have
called into OpenMP, libgomp has more threads than there are cores, and lets them sleep between any
two products. A forward of DeiT-tiny then takes two thirds longer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitlib.serve.compute_lock import ComputeLock
from vitlib.serve.core import DEFAULT_EXPLANATION, Core, Kind
from vitlib.serve.explanation import Explanation

logger = logging.getLogger("vitlib")
# Weights of the running mean of seconds an image takes.
_OLD, _NEW = 0.8, 0.2


@dataclass(eq=False)  # compared by identity: comparing tensors would raise
class Item:
    """An image in the queue.

    Attributes:
        kind: The result to compute.
        image: (C, H, W).
        done: Takes the row or an Exception, in the thread that computes; see finish().
        deadline: time.monotonic() after which the image is not computed any more.
        is_cancelled: Returns True once the result is not needed any more.
        explanation: The map of "attend".
        arrival: time.monotonic() of its arrival.
        is_finished: True once a row was passed on.
    """

    kind: Kind
    image: Tensor
    done: Callable[[Any], None]
    deadline: float
    is_cancelled: Callable[[], bool]
    explanation: Explanation = DEFAULT_EXPLANATION
    arrival: float = field(default_factory=time.monotonic)
    is_finished: bool = False

    def fits(self, other: Item) -> bool:
        """Return True if both images can be in one batch.

        Args:
            other: Another image.

        Returns:
            True for equal kind, explanation, shape and dtype.
        """
        return (
            self.kind == other.kind
            and self.explanation == other.explanation
            and self.image.shape == other.image.shape
            and self.image.dtype == other.image.dtype
        )

    def finish(self, row: Any) -> None:
        """Pass the row on, unless an earlier one was passed on; never raise.

        If `done` fails with the row, it gets the error in its place.

        Args:
            row: The row, or an Exception.
        """
        if self.is_finished:
            return
        self.is_finished = True
        try:
            self.done(row)
        except Exception as error:
            logger.exception("the row of an image cannot be passed on")
            with suppress(Exception):
                self.done(error)


class DeadlineError(Exception):
    """An image waited past its deadline and was not computed."""


class Batcher:
    """One queue of images, and a thread for each copy of the model.

    Attributes:
        cores: The models, one for each thread.
        max_batch: The largest number of images of a batch.
        max_wait: Seconds that an image waits for others that are announced.
        seconds_per_image: Running mean over recent batches, divided by the number of threads. 0
            until the first value is set from outside.
    """

    def __init__(
        self,
        make: Sequence[Callable[[], Core]],
        compute_lock: ComputeLock,
        *,
        max_batch: int,
        max_wait: float,
        on_batch: Callable[[int, float], None],
    ) -> None:
        """Start the threads, and wait until each has made its model.

        Args:
            make: Makes a model; called in the thread that uses it. Its errors are raised here.
            compute_lock: The lock between decoding and computing.
            max_batch: The largest number of images of a batch.
            max_wait: Seconds that an image waits for others that are announced.
            on_batch: Called with (number of images, seconds) after each batch.
        """
        self.max_batch, self.max_wait, self.on_batch = max_batch, max_wait, on_batch
        self.compute_lock = compute_lock
        self.seconds_per_image = 0.0
        self._queue: deque[Item] = deque()
        self._reserved = self._running = 0
        self._is_open = True
        self._changed = threading.Condition()
        models: queue.SimpleQueue[Core | BaseException] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=self._serve, args=(make_core, models), name=f"vitlib-model-{i}", daemon=True
            )
            for i, make_core in enumerate(make)
        ]
        for thread in self._threads:
            thread.start()
        self.cores: list[Core] = []
        for _ in self._threads:
            core = models.get()
            if isinstance(core, BaseException):
                self._is_open = False
                raise core
            self.cores.append(core)

    @property
    def waiting(self) -> int:
        """The number of images in the queue."""
        return len(self._queue)

    @property
    def backlog(self) -> int:
        """The number of images that are announced, in the queue, or being computed."""
        return self._reserved + len(self._queue) + self._running

    def reserve(self, count: int) -> None:
        """Announce images that will be put, or take an announcement back.

        Args:
            count: The number of images; below 0 for images that will not be put.
        """
        with self._changed:
            self._reserved += count
            if count < 0:  # the queue may be complete now
                self._changed.notify()

    def put(self, item: Item) -> None:
        """Add an announced image to the queue.

        Args:
            item: The image.
        """
        with self._changed:
            self._reserved -= 1
            self._queue.append(item)
            self._changed.notify()

    def close(self) -> None:
        """Compute all images in the queue, then end the threads."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(
        self, make: Callable[[], Core], models: queue.SimpleQueue[Core | BaseException]
    ) -> None:
        """Make a model, then compute batches until the batcher is closed."""
        try:
            core = make()
        except BaseException as error:
            models.put(error)
            return
        models.put(core)
        while self._is_serving(core):
            pass

    def _is_serving(self, core: Core) -> bool:
        """Compute the next batch; return False once closed. Never raise, whatever fails.

        The rows of a batch in which the model fails are its error. Other errors are mistakes of
        this package, and must not leave requests without an answer.
        """
        batch: list[Item] | None = []
        try:
            batch = self._next_batch()
            if batch:
                self._compute(core, batch)
        except BaseException as error:
            logger.exception("the thread of the model failed; it continues with the next batch")
            self._fail(batch or [], error)
        # The batch ends with this call: else the thread keeps its images while it waits for others.
        return batch is not None

    def _fail(self, batch: list[Item], error: BaseException) -> None:
        """Give an error to the images of a batch, or to all in the queue if there is no batch.

        Any image in the queue may be the reason why no batch can be taken, so that all are removed.
        """
        if not batch:
            with self._changed:
                batch = list(self._queue)
                self._queue.clear()
        reason = RuntimeError(f"the batch failed: {type(error).__name__}: {error}")
        reason.__cause__ = error
        for item in batch:
            item.finish(reason)

    def _compute(self, core: Core, batch: list[Item]) -> None:
        """Compute a batch and pass each row on."""
        try:
            with self.compute_lock.computing():
                start = time.perf_counter()
                rows = _compute_rows(core, batch)
                seconds = time.perf_counter() - start
        finally:
            with self._changed:
                self._running -= len(batch)
        latest = seconds / len(batch) / len(self._threads)
        with self._changed:
            mean = self.seconds_per_image
            self.seconds_per_image = _OLD * mean + _NEW * latest if mean else 0.0
        for item, row in zip(batch, rows, strict=True):
            item.finish(row)
        self.on_batch(len(batch), seconds)

    def _next_batch(self) -> list[Item] | None:
        """Wait for the next batch; an empty one where images expired, None once closed."""
        expired: list[Item] = []
        try:
            with self._changed:
                while True:
                    self._remove_obsolete(expired)
                    if expired:
                        return []
                    if self._queue and self._is_due():
                        return self._take_batch()
                    if not self._queue and not self._is_open:
                        return None
                    self._changed.wait(self._seconds_to_wait())
        finally:
            # Outside the lock: `done` may take long, and may call the batcher.
            for item in expired:
                item.finish(DeadlineError())

    def _is_due(self) -> bool:
        """Return True if a batch is to start now; see the top of this file."""
        return (
            len(self._queue) >= self.max_batch
            or self._reserved <= 0
            or time.monotonic() >= self._queue[0].arrival + self.max_wait
        )

    def _seconds_to_wait(self) -> float | None:
        """Return the seconds until the oldest image has waited max_wait; None without images."""
        if not self._queue:
            return None
        return max(self._queue[0].arrival + self.max_wait - time.monotonic(), 0.0)

    def _remove_obsolete(self, expired: list[Item]) -> None:
        """Remove cancelled items, and move expired ones to `expired`, in the next batch's reach.

        Items behind the next batch are checked later. A check of the whole queue at each batch
        would hold the lock for longer than it saves.
        """
        now = time.monotonic()
        for item in [*self._queue][: self.max_batch]:
            if item.is_cancelled():
                self._queue.remove(item)
            elif now > item.deadline:
                self._queue.remove(item)
                expired.append(item)

    def _take_batch(self) -> list[Item]:
        """Take the oldest image and the next ones that fit it, in order; the others stay."""
        first = self._queue[0]
        batch: list[Item] = []
        others: deque[Item] = deque()
        while self._queue and len(batch) < self.max_batch:
            item = self._queue.popleft()
            (batch if item.fits(first) else others).append(item)
        self._queue.extendleft(reversed(others))
        self._running += len(batch)
        return batch


def _compute_rows(core: Core, batch: list[Item]) -> list[Any]:
    """Return a row for each image; where the batch fails, its error for each."""
    try:
        first = batch[0]
        explanation = [first.explanation] if first.kind == "attend" else []
        rows = core.answer(first.kind, [item.image for item in batch], *explanation)
        # Which row is of which image is not known.
        if len(rows) != len(batch):
            raise RuntimeError(f"the model gives {len(rows)} rows for {len(batch)} images")
        return rows
    except Exception as error:
        return [error] * len(batch)
