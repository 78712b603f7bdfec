"""Batcher: images of many requests, made into batches, by one thread for each device.

How data flows: put() -> a queue -> the thread takes the oldest image and others like it, up to
max_batch -> the model -> each image's `done` is told its row, or what went wrong.

When a batch starts: as soon as max_batch images wait, or none that was promised (reserve()) is
still being read, or the oldest has waited max_wait. So a lone image starts at once, and of many
that arrive together none starts before the others are there to come along.

Each thread makes its own model, and no other thread computes: where two threads of a process have
called into OpenMP, libgomp holds more threads than there are cores, and lets them sleep between any
two products, which costs DeiT-tiny two thirds of a forward more.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitlib.serve.compute_lock import ComputeLock
from vitlib.serve.core import Core, Kind

Done = Callable[[Any], None]  # told a row, or an Exception


@dataclass(eq=False)  # one item is no other: comparing their images would raise
class Item:
    """An image that waits for its answer."""

    kind: Kind
    image: Tensor
    done: Done
    deadline: float  # time.monotonic(); later it is not begun
    cancelled: Callable[[], bool]
    came: float = field(default_factory=time.monotonic)

    def like(self, other: Item) -> bool:
        """Whether both may be in one batch."""
        return (
            self.kind == other.kind
            and self.image.shape == other.image.shape
            and self.image.dtype == other.image.dtype
        )


class DeadlineError(Exception):
    """An image waited past its deadline and was not computed."""


class Batcher:
    """One queue, and a thread for each core, all of the same model.

    make: makes a core, in the thread that will use it. What it raises is raised here. measured:
    told (batch size, seconds) of every batch.
    """

    def __init__(
        self,
        make: Sequence[Callable[[], Core]],
        compute_lock: ComputeLock,
        *,
        max_batch: int,
        max_wait: float,
        measured: Callable[[int, float], None],
    ) -> None:
        self.max_batch, self.max_wait, self.measured = max_batch, max_wait, measured
        self.compute_lock = compute_lock
        self.seconds_an_image = 0.0  # lately, once it was set; what a backlog is counted with
        self._queue: deque[Item] = deque()
        self._reserved = self._running = 0
        self._open = True
        self._changed = threading.Condition()
        made: queue.SimpleQueue[Core | BaseException] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=self._serve, args=(one, made), name=f"vitlib-model-{i}", daemon=True
            )
            for i, one in enumerate(make)
        ]
        for thread in self._threads:
            thread.start()
        self.cores: list[Core] = []
        for _ in self._threads:
            found = made.get()
            if isinstance(found, BaseException):
                self._open = False
                raise found
            self.cores.append(found)

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    @property
    def backlog(self) -> int:
        """Images promised, in the queue, and being computed."""
        return self._reserved + len(self._queue) + self._running

    def reserve(self, count: int) -> None:
        """So many images more are about to be put, or fewer (count < 0): one failed, or came."""
        with self._changed:
            self._reserved += count
            if count < 0:
                self._changed.notify()

    def put(self, item: Item) -> None:
        """An image that was promised."""
        with self._changed:
            self._reserved -= 1
            self._queue.append(item)
            self._changed.notify()

    def close(self) -> None:
        """Answer all that was put, then end the threads."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(
        self, make: Callable[[], Core], made: queue.SimpleQueue[Core | BaseException]
    ) -> None:
        try:
            core = make()
        except BaseException as error:
            made.put(error)
            return
        made.put(core)
        while (batch := self._next()) is not None:
            if batch:
                self._compute(core, batch)
            del batch  # else the last images are held until others come

    def _compute(self, core: Core, batch: list[Item]) -> None:
        with self.compute_lock.computing():
            start = time.perf_counter()
            rows = _answers(core, batch)
            seconds = time.perf_counter() - start
        with self._changed:
            self._running -= len(batch)
            each = seconds / len(batch) / len(self._threads)
            known = self.seconds_an_image
            self.seconds_an_image = 0.8 * known + 0.2 * each if known else 0.0
        for item, row in zip(batch, rows, strict=True):
            item.done(row)
        self.measured(len(batch), seconds)

    def _next(self) -> list[Item] | None:
        """The next batch, when it is time; empty where some were too late; None: closed."""
        late: list[Item] = []
        try:
            with self._changed:
                while True:
                    self._drop(late)
                    if late:
                        return []
                    if self._queue and self._is_time():
                        return self._taken()
                    if not self._queue and not self._open:
                        return None
                    self._changed.wait(self._patience())
        finally:
            for item in late:
                item.done(DeadlineError())

    def _is_time(self) -> bool:
        return (
            len(self._queue) >= self.max_batch
            or self._reserved <= 0
            or time.monotonic() >= self._queue[0].came + self.max_wait
        )

    def _patience(self) -> float | None:
        """Seconds until the oldest image has waited enough; None: none waits."""
        if not self._queue:
            return None
        return max(self._queue[0].came + self.max_wait - time.monotonic(), 0.0)

    def _drop(self, late: list[Item]) -> None:
        """Out with what nobody waits for, and with what is too late, of the next batch's length."""
        now = time.monotonic()
        for item in [*self._queue][: self.max_batch]:
            if item.cancelled():
                self._queue.remove(item)
            elif now > item.deadline:
                self._queue.remove(item)
                late.append(item)

    def _taken(self) -> list[Item]:
        """The oldest image and the next ones like it, up to max_batch, in order."""
        first = self._queue[0]
        batch: list[Item] = []
        left: deque[Item] = deque()
        while self._queue and len(batch) < self.max_batch:
            item = self._queue.popleft()
            (batch if item.like(first) else left).append(item)
        self._queue.extendleft(reversed(left))
        self._running += len(batch)
        return batch


def _answers(core: Core, batch: list[Item]) -> list[Any]:
    """A row an image; what went wrong with the batch in place of each."""
    try:
        return core.answer(batch[0].kind, [item.image for item in batch])
    except Exception as error:
        return [error] * len(batch)
