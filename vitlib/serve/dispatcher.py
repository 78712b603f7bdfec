"""Dispatcher: a request's bytes -> its rows; reading threads, the queue and its limits.

How data flows: answer() is awaited by the HTTP side; a thread of `readers` parses the body and
decodes its images (one image there and then, several spread over the threads; URLs are fetched by
threads of their own, and images that may take long are decoded by one of low priority), each goes
into the batcher, its row comes back into its place, and when the last one is there the loop is
told. A bad image fills its place with a RequestError and touches no other.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlib.errors import ImageError
from vitlib.scores import NOT_FINITE
from vitlib.serve.batcher import Batcher, DeadlineError, Item
from vitlib.serve.compute_lock import ComputeLock
from vitlib.serve.core import Core, Kind
from vitlib.serve.errors import RequestError, too_many_images
from vitlib.serve.metrics import ServerMetrics
from vitlib.serve.protocol import decode_base64, is_url
from vitlib.serve.settings import MIB, Settings
from vitlib.serve.url_fetch import Fetcher

FETCHERS = 16  # threads that wait for other servers
MOST_SLOW = 64  # images that wait for the thread of those that take long to decode
SLOW_NICE = 5  # beside a busy model such a thread has a quarter of a core
FEW = 16  # images that are accepted however slow the model is


class Job:
    """A request on its way: a place for each image's row."""

    def __init__(self, kind: Kind, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self.kind, self.loop, self.deadline = kind, loop, deadline
        self.future: asyncio.Future[list[Any]] = loop.create_future()
        self.rows: list[Any] = []
        self.gone = False  # nobody waits any more
        self._left = 0
        self._lock = threading.Lock()

    def expects(self, count: int) -> None:
        """So many images."""
        self.rows, self._left = [None] * count, count

    def fill(self, index: int, row: Any) -> None:
        """An image's row, or what is wrong with it."""
        with self._lock:
            self.rows[index] = row
            self._left -= 1
            done = self._left == 0
        if done:
            self.tell(self.rows)

    def abandon(self) -> None:
        """The server ends before it is answered. Called by the loop's thread."""
        self.gone = True
        self._set(ending())

    def tell(self, result: Any) -> None:
        """The loop: rows, or an Exception in place of all."""
        self.loop.call_soon_threadsafe(self._set, result)

    def _set(self, result: Any) -> None:
        if self.future.done():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Dispatcher:
    """All that computes. Public methods are the event loop's thread's to call."""

    def __init__(
        self, make: Sequence[Callable[[], Core]], settings: Settings, metrics: ServerMetrics
    ) -> None:
        """make: makes a model, one for each device; see Batcher."""
        self.limits, self.metrics = settings.limits, metrics
        self.compute_lock = ComputeLock()
        self.batcher = Batcher(
            [partial(_warmed_up, one, self.limits.max_batch) for one in make],
            self.compute_lock,
            max_batch=self.limits.max_batch,
            max_wait=self.limits.max_wait_ms / 1000,
            measured=self._measured,
        )
        self.core = self.batcher.cores[0]
        self.compute_lock.shared = self.core.engine.device.type != "cpu"
        threads = max(torch.get_num_threads(), 2)  # as many as compute, which take turns with them
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="vitlib-read")
        self._slow = ThreadPoolExecutor(1, "vitlib-read-slow", initializer=_yield_the_cores)
        self._slow_waiting = 0
        self._jobs: set[Job] = set()
        self._ended = False
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="vitlib-fetch")
        self.fetcher = Fetcher(
            hosts=tuple(host.lower() for host in settings.allow_urls),
            max_bytes=self.limits.max_body_mib * MIB,
            private=settings.allow_private_urls,
        )
        self._lock = threading.Lock()
        self._held = 0  # bytes of the bodies of all requests that are not answered

    def _measured(self, size: int, seconds: float) -> None:
        self.metrics.batches.observe(size)
        self.metrics.batch_seconds.observe(seconds)
        self._gauge()

    def _gauge(self) -> None:
        self.metrics.queue.set(self.batcher.waiting)
        self.metrics.backlog.set(self.batcher.backlog)

    def take(self, size: int) -> None:
        """So many bytes of a body have come. Raises RequestError, 429, where all are too many.
        By any thread."""
        with self._lock:
            if self._held + size > self.limits.max_pending_mib * MIB:
                raise replace(busy("too many bytes are held already", 1), close=True)  # amid it
            self._held += size

    def give(self, size: int) -> None:
        """A request whose body had so many bytes is answered."""
        with self._lock:
            self._held -= size

    def check_attention_memory(self, images: int = 1) -> None:
        """Raises RequestError, 429, where so many images more would wait too long.

        A server with little to do takes any request that is within the other limits.
        """
        backlog = self.batcher.backlog
        seconds = backlog * self.batcher.seconds_an_image
        full = backlog + images > self.limits.max_queue
        few = max(self.limits.max_batch, FEW)
        late = backlog >= few and seconds * 1000 >= self.limits.max_backlog_ms
        if backlog and (full or late):
            raise busy(f"{backlog} images wait already", seconds)

    async def answer(self, kind: Kind, images_of: Callable[[], Sequence[Any]]) -> list[Any]:
        """The rows of a request whose body has come, in order; RequestError in a bad one's place.

        images_of: gives its images, each bytes, base64 text or a URL; called by a thread, may raise
        RequestError, as this does.
        """
        self.check_attention_memory()
        if self._ended:
            raise ending()
        job = Job(kind, asyncio.get_running_loop(), time.monotonic() + self.limits.timeout)
        self._jobs.add(job)
        self.batcher.reserve(1)
        self._readers.submit(self._read_request, job, images_of)
        try:
            return await job.future
        finally:
            job.gone = True
            self._jobs.discard(job)

    def abandon(self) -> None:
        """Answer 503 to all that was accepted and is not answered."""
        self._ended = True
        for job in self._jobs:
            job.abandon()

    def _read_request(self, job: Job, images_of: Callable[[], Sequence[Any]]) -> None:
        promised = 1
        try:
            with self.compute_lock.reading():
                images = images_of()
            if len(images) > self.limits.most_images:
                raise too_many_images(self.limits.most_images)
            if len(images) > 1:
                self.check_attention_memory(len(images) - 1)
            job.expects(len(images))
            self.batcher.reserve(len(images) - 1)
            promised = len(images)
        except Exception as error:
            self.batcher.reserve(-promised)
            job.tell(error)
            return
        for index, image in enumerate(images):
            if is_url(image):
                self.batcher.reserve(-1)  # nobody is to wait for another server
                self._fetchers.submit(self._fetch, job, index, image)
            elif len(images) == 1:
                self._read_image(job, index, image)
            else:
                self._readers.submit(self._read_image, job, index, image)

    def _fetch(self, job: Job, index: int, url: str) -> None:
        try:
            data: Any = self.fetcher.fetch(url)
        except Exception as error:
            data = error
        self.batcher.reserve(1)
        self._readers.submit(self._read_image, job, index, data)

    def _read_image(self, job: Job, index: int, image: Any) -> None:
        """Decode an image and put it into the queue, or leave it to the slow ones' thread; never
        raises."""
        try:
            if job.gone:
                raise RequestError(499, "gone", "the client went away")
            if isinstance(image, Exception):
                raise image
            with self.compute_lock.reading():
                data = image if isinstance(image, bytes) else decode_base64(image)
                slow = self.core.is_slow(data)
                read = None if slow else self._read(job, data)
        except Exception as error:
            self.batcher.reserve(-1)
            job.fill(index, _as_refusal(error))
            return
        if read is not None:
            self._put(job, index, *read)
            return
        self.batcher.reserve(-1)  # no batch waits for it
        with self._lock:
            room = self._slow_waiting < MOST_SLOW
            self._slow_waiting += room
        if room:
            self._slow.submit(self._read_slow, job, index, data)
        else:
            job.fill(index, busy(f"{MOST_SLOW} images that take long to decode wait already", 1))

    def _read_slow(self, job: Job, index: int, data: bytes) -> None:
        """As _read_image, by the thread of those that may take long."""
        try:
            if job.gone:
                raise RequestError(499, "gone", "the client went away")
            if time.monotonic() > job.deadline:
                raise DeadlineError
            read = self._read(job, data)
        except Exception as error:
            job.fill(index, _as_refusal(error))
            return
        finally:
            with self._lock:
                self._slow_waiting -= 1
        self.batcher.reserve(1)
        self._put(job, index, *read)

    def _read(self, job: Job, data: bytes) -> tuple[Tensor, Any]:
        """Pixels, and what the model sees of the image where that is asked for."""
        shown = self.core.shown(data) if job.kind == "attend" else None
        return self.core.read(data, job.kind), shown

    def _put(self, job: Job, index: int, pixels: Tensor, shown: Any) -> None:
        self.batcher.put(
            Item(
                job.kind, pixels, lambda row: job.fill(index, _row(row, shown)), job.deadline,
                lambda: job.gone,
            )
        )  # fmt: skip

    def warm_up(self) -> None:
        """Compute a lone image and a full batch, so that the first request is as fast as the rest,
        and its time is known. Blocks."""
        image = self.core.blank()
        for size in (1, self.limits.max_batch):
            rows: queue.SimpleQueue[Any] = queue.SimpleQueue()
            start = time.perf_counter()
            self.batcher.reserve(size)
            for _ in range(size):
                kind = self.core.kinds[0]
                self.batcher.put(Item(kind, image, rows.put, float("inf"), lambda: False))
            for _ in range(size):
                rows.get()
        self.batcher.seconds_an_image = (time.perf_counter() - start) / size

    def close(self) -> None:
        """Answer all that was accepted, then end the threads."""
        self._fetchers.shutdown()
        self._readers.shutdown()
        self._slow.shutdown()
        self.batcher.close()


def _warmed_up(make: Callable[[], Core], max_batch: int) -> Core:
    """Make a model and warm it up, in the thread that computes with it."""
    core = make()
    core.warm_up(max_batch)
    return core


def busy(why: str, seconds: float) -> RequestError:
    """429, with when to come again."""
    return RequestError(
        429, "overloaded", f"{why}: try again later", retry_after=max(1, round(seconds))
    )


def _row(row: Any, shown: Any) -> Any:
    """What the batcher says of an image: its row, beside what the model saw of it where that is
    asked for; or what the client is told in its place."""
    if isinstance(row, DeadlineError):
        return busy("the request was not begun in time", 0)
    if isinstance(row, Exception):
        return row
    if not np.isfinite(row).all():
        return RequestError(500, "not_finite", f"{NOT_FINITE} for this image")
    return row if shown is None else (row, shown)


def ending() -> RequestError:
    """503: the server ends, another may answer."""
    return RequestError(503, "ending", "the server ends: try again", retry_after=1, close=True)


def _yield_the_cores() -> None:
    """Give this thread, and the processes it starts, the cores only where no other wants them."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SLOW_NICE)


def _as_refusal(error: Exception) -> Exception:
    if isinstance(error, DeadlineError):
        return busy("the request was not begun in time", 0)
    if isinstance(error, ImageError):
        return RequestError(400, "bad_image", str(error))
    return error
