"""Dispatch the images of requests to threads and to the batcher, and collect their rows.

answer() is awaited by the HTTP side. A thread of `_readers` parses the body and decodes its images:
a single image at once, several spread over the threads. Images by URL are fetched by threads of
their own, and images that may take long are decoded by a thread of low priority. Each image goes
into the batcher, and its row comes back into its place. When the last row is there, the event loop
gets the result. A bad image gets a RequestError as its row, and no other image is affected.

The dispatcher also bounds what is accepted: bytes of bodies, images, and seconds of work.
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
from vitlib.serve.core import DEFAULT_EXPLANATION, Core, Kind
from vitlib.serve.errors import RequestError, overload_error, shutdown_error, too_many_images
from vitlib.serve.explanation import Explanation
from vitlib.serve.metrics import ServerMetrics
from vitlib.serve.pending import PendingRequest
from vitlib.serve.protocol import decode_base64, is_url
from vitlib.serve.settings import MIB, Settings
from vitlib.serve.url_fetch import Fetcher

NUM_FETCHERS = 16  # threads that wait for other servers
MAX_SLOW = 64  # images in the queue of the thread for slow decodes
SLOW_NICE = 5  # niceness of that thread: beside a busy model it gets a quarter of a core
MIN_ACCEPTED = 16  # images that are accepted however slow the model is


class Dispatcher:
    """The way from a request's images to their rows.

    Public methods are for the event loop's thread, where nothing else is stated.

    Attributes:
        core: One of the models, for its labels, task and limits.
        batcher: The queue of images.
        fetcher: Fetches images by URL.
        limits: The server's limits.
        metrics: The server's metrics.
    """

    def __init__(
        self, make: Sequence[Callable[[], Core]], settings: Settings, metrics: ServerMetrics
    ) -> None:
        """Start the threads, and load the model.

        Args:
            make: Makes a model, for each device; see Batcher.
            settings: The server's settings.
            metrics: The server's metrics.
        """
        self.limits, self.metrics = settings.limits, metrics
        self.compute_lock = ComputeLock()
        self.batcher = Batcher(
            [partial(_make_warm, make_core, self.limits.max_batch) for make_core in make],
            self.compute_lock,
            max_batch=self.limits.max_batch,
            max_wait=self.limits.max_wait_ms / 1000,
            on_batch=self._count_batch,
        )
        self.core = self.batcher.cores[0]
        self.compute_lock.is_open = self.core.engine.device.type != "cpu"
        # As many threads as compute: both use all cores, and the lock lets one side run at a time.
        threads = max(torch.get_num_threads(), 2)
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="vitlib-read")
        self._slow_reader = ThreadPoolExecutor(1, "vitlib-read-slow", initializer=_lower_priority)
        self._num_slow = 0
        self._requests: set[PendingRequest] = set()
        self._is_ended = False
        self._fetchers = ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="vitlib-fetch")
        self.fetcher = Fetcher(
            hosts=tuple(host.lower() for host in settings.allow_urls),
            max_bytes=self.limits.max_body_mib * MIB,
            allow_private=settings.allow_private_urls,
        )
        self._lock = threading.Lock()
        # Of the bodies of all requests that are not answered.
        self._reserved_bytes = 0

    def _count_batch(self, size: int, seconds: float) -> None:
        """Update the metrics after a batch."""
        self.metrics.batches.observe(size)
        self.metrics.batch_seconds.observe(seconds)
        self.metrics.queue.set(self.batcher.waiting)
        self.metrics.backlog.set(self.batcher.backlog)

    def reserve_bytes(self, size: int) -> None:
        """Count bytes of a body before they are stored; in any thread.

        Args:
            size: The number of further bytes.

        Raises:
            RequestError: Status 429: all bodies together are too large.
        """
        with self._lock:
            if self._reserved_bytes + size > self.limits.max_pending_mib * MIB:
                # Closed, because the rest of the body is on its way.
                raise replace(
                    overload_error("the bodies of pending requests are too large", 1), close=True
                )
            self._reserved_bytes += size

    def release_bytes(self, size: int) -> None:
        """Release the bytes of an answered request.

        Args:
            size: The number of bytes that were reserved for it.
        """
        with self._lock:
            self._reserved_bytes -= size

    def check_capacity(self, images: int = 1) -> None:
        """Check that further images would not wait too long; in any thread.

        A server with little to do accepts any request that is within the other limits.

        Args:
            images: The number of further images.

        Raises:
            RequestError: Status 429: the queue is full, or has too many seconds of work.
        """
        backlog = self.batcher.backlog
        seconds = backlog * self.batcher.seconds_per_image
        is_full = backlog + images > self.limits.max_queue
        min_accepted = max(self.limits.max_batch, MIN_ACCEPTED)
        is_late = backlog >= min_accepted and seconds * 1000 >= self.limits.max_backlog_ms
        if backlog and (is_full or is_late):
            raise overload_error(f"{backlog} images wait already", seconds)

    async def answer(
        self,
        kind: Kind,
        parse: Callable[[], Sequence[Any]],
        explanation: Explanation = DEFAULT_EXPLANATION,
    ) -> list[Any]:
        """Answer a request whose body was read.

        Args:
            kind: The result to compute.
            parse: Returns the request's images, each bytes, base64 text or a URL; called in
                another thread, may raise RequestError.
            explanation: The map of "attend".

        Returns:
            The row of each image in order; an Exception for an image without a row.

        Raises:
            RequestError: The request is refused as a whole.
        """
        self.check_capacity()
        if self._is_ended:
            raise shutdown_error()
        deadline = time.monotonic() + self.limits.timeout
        request = PendingRequest(kind, asyncio.get_running_loop(), deadline, explanation)
        self._requests.add(request)
        self.batcher.reserve(1)
        self._readers.submit(self._read_request, request, parse)
        try:
            return await request.future
        finally:
            request.is_cancelled = True
            self._requests.discard(request)

    def abort(self) -> None:
        """Answer 503 to every request that was accepted and is not answered."""
        self._is_ended = True
        for request in self._requests:
            request.abort()

    def _read_request(self, request: PendingRequest, parse: Callable[[], Sequence[Any]]) -> None:
        """Parse a request, and dispatch its images."""
        # By answer(); kept in step with the batcher, which waits for these images.
        reserved = 1
        try:
            with self.compute_lock.decoding():
                images = parse()
            if len(images) > self.limits.max_images_of_request:
                raise too_many_images(self.limits.max_images_of_request)
            if len(images) > 1:
                self.check_capacity(len(images) - 1)
            request.expect(len(images))
            self.batcher.reserve(len(images) - 1)
            reserved = len(images)
        except Exception as error:
            self.batcher.reserve(-reserved)
            request.set_result(error)
            return
        for index, image in enumerate(images):
            if is_url(image):
                self.batcher.reserve(-1)  # no batch waits for another server
                self._fetchers.submit(self._fetch, request, index, image)
            elif len(images) == 1:
                self._read_image(request, index, image)
            else:
                self._readers.submit(self._read_image, request, index, image)

    def _fetch(self, request: PendingRequest, index: int, url: str) -> None:
        """Fetch an image by URL, and pass it to a reading thread."""
        try:
            data: Any = self.fetcher.fetch(url)
        except Exception as error:
            data = error
        self.batcher.reserve(1)
        self._readers.submit(self._read_image, request, index, data)

    def _read_image(self, request: PendingRequest, index: int, image: Any) -> None:
        """Decode an image and queue it, or pass it to the thread for slow decodes; never raise."""
        try:
            if request.is_cancelled:
                raise RequestError(499, "gone", "the client went away")
            if isinstance(image, Exception):
                raise image
            with self.compute_lock.decoding():
                data = image if isinstance(image, bytes) else decode_base64(image)
                is_slow = self.core.is_slow(data)
                pixels = None if is_slow else self._preprocess(request, data)
        except Exception as error:
            self.batcher.reserve(-1)
            request.set_row(index, _to_request_error(error))
            return
        if pixels is not None:
            self._put(request, index, *pixels)
            return
        self.batcher.reserve(-1)  # no batch waits for a slow decode
        with self._lock:
            has_room = self._num_slow < MAX_SLOW
            self._num_slow += has_room
        if has_room:
            self._slow_reader.submit(self._read_slow_image, request, index, data)
        else:
            reason = f"{MAX_SLOW} images that take long to decode wait already"
            request.set_row(index, overload_error(reason, 1))

    def _read_slow_image(self, request: PendingRequest, index: int, data: bytes) -> None:
        """Decode an image that may take long and queue it; never raise."""
        try:
            if request.is_cancelled:
                raise RequestError(499, "gone", "the client went away")
            if time.monotonic() > request.deadline:
                raise DeadlineError
            pixels = self._preprocess(request, data)
        except Exception as error:
            request.set_row(index, _to_request_error(error))
            return
        finally:
            with self._lock:
                self._num_slow -= 1
        self.batcher.reserve(1)
        self._put(request, index, *pixels)

    def _preprocess(self, request: PendingRequest, data: bytes) -> tuple[Tensor, Any]:
        """Return the pixels, and for an attention map the part of the image that they show."""
        box = self.core.visible_box(data) if request.kind == "attend" else None
        return self.core.preprocess(data, request.kind), box

    def _put(self, request: PendingRequest, index: int, pixels: Tensor, box: Any) -> None:
        """Queue an image."""
        self.batcher.put(
            Item(
                request.kind, pixels, lambda row: request.set_row(index, _to_row(row, box)),
                request.deadline, lambda: request.is_cancelled, request.explanation,
            )
        )  # fmt: skip

    def warm_up(self) -> None:
        """Compute one image and a full batch; blocks, in any thread.

        The first request is then as fast as later ones, and the time of an image is known.
        """
        image, kind = self.core.blank_image(), self.core.kinds[0]
        for size in (1, self.limits.max_batch):
            rows: queue.SimpleQueue[Any] = queue.SimpleQueue()
            start = time.perf_counter()
            self.batcher.reserve(size)
            for _ in range(size):
                self.batcher.put(Item(kind, image, rows.put, float("inf"), lambda: False))
            for _ in range(size):
                rows.get()
        self.batcher.seconds_per_image = (time.perf_counter() - start) / size

    def close(self) -> None:
        """Answer the accepted requests, then end the threads; blocks, in any thread."""
        # In the order in which threads pass images on: each pool is empty before the next closes.
        self._fetchers.shutdown()
        self._readers.shutdown()
        self._slow_reader.shutdown()
        self.batcher.close()


def _make_warm(make: Callable[[], Core], max_batch: int) -> Core:
    """Make a model and warm it up, in the thread that computes with it."""
    core = make()
    core.warm_up(max_batch)
    return core


def _to_row(row: Any, box: Any) -> Any:
    """Turn a row of the batcher into one of an answer: with the box of an attention map, if any.

    An expired image, and a row that is not finite, become errors for the client.
    """
    if isinstance(row, Exception):
        return _to_request_error(row)
    if not np.isfinite(row).all():
        return RequestError(500, "not_finite", f"{NOT_FINITE} for this image")
    return row if box is None else (row, box)


def _to_request_error(error: Exception) -> Exception:
    """Turn an expected error into one for the client; others stay, and the app answers 500."""
    if isinstance(error, DeadlineError):
        return overload_error("the request was not begun in time", 0)
    if isinstance(error, ImageError):
        return RequestError(400, "bad_image", str(error))
    return error


def _lower_priority() -> None:
    """Lower the priority of this thread, and of the processes that it starts, below the model's."""
    # Elsewhere setpriority acts on the whole process.
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SLOW_NICE)
