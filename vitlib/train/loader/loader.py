"""Photos to batches of pixels for training: read, cached, augmented, normalised, mixed.

How data flows: a photo is decoded upright and, where it is far larger than the pixels it becomes,
shrunk; those levels may be kept. Then it is augmented with the numbers of its (seed, epoch,
sample), normalised by the model's own rule, erased in part, and mixed with its partner, which was
read in the same way with its own numbers. So a sample's pixels depend on (seed, epoch, sample) and
its plan alone, whatever batch, thread or process it is in, and whether it was cached.

Shapes: B photos of a batch, C channels, H W pixels; h w a photo's own sides. Levels are 0..255.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

import torch

from vitlib.errors import ConfigError, DataError, ImageError
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.train.augment import Augment
from vitlib.train.loader.cache import cache_for
from vitlib.train.loader.photos import Failed, PhotoReader, Pixels, assemble, needed, pixel_size
from vitlib.train.loader.pool import Pool, can_fork, empty_pixels
from vitlib.train.sampler import BatchPlan

_logger = logging.getLogger("vitlib")
_THREADS = min(8, os.cpu_count() or 1)
_CHOICES = {"cache": ("auto", "memory", "none"), "on_bad": ("fail", "skip")}


@dataclass(frozen=True)
class Batch:
    """What came of one plan."""

    pixels: torch.Tensor  # (B, C, H, W) float32
    # What of the plan they are: without the samples that could not be read, and with a share of 1
    # where a partner could not.
    plan: BatchPlan
    failed: Failed = ()  # each photo that could not be read, once: (sample, why)

    @property
    def samples(self) -> tuple[int, ...]:
        """The number of each photo in the set, B of them."""
        return self.plan.samples


class PhotoLoader:
    """Photos as batches of pixels. Close it, or use it in a `with`: it may hold processes.

    `batches` is what training reads, `evaluation_batches` what the model sees in use. Both may be
    under way at once, in one thread.
    """

    def __init__(
        self,
        photos: Sequence[ImageLike],
        image_processor: ImageProcessor,
        augment: Augment | None = None,
        *,
        seed: int = 0,
        workers: int = 0,
        cache: Literal["auto", "memory", "none"] = "auto",
        on_bad: Literal["fail", "skip"] = "fail",
        pin: bool = False,
    ) -> None:
        """
        Args:
            photos: paths, or whatever image/decode.py reads.
            image_processor: the rule; its pixels must all be of one size.
            augment: what training changes; None: nothing, the pixels are image_processor's.
            seed: at least 0; with epoch and sample, what augmentation is drawn from.
            workers: processes that read; 0: threads of this one, as where none can be forked.
            cache: keep photos, shrunk, in memory: "auto" in up to a quarter of what is free,
                "memory" in nine tenths of it, "none" not. What does not fit is read each time.
            on_bad: at a photo that cannot be read, "fail" or "skip" it, naming it in the batch.
            pin: whether pixels lie in pinned memory, from which a GPU copies without a wait.

        Raises ConfigError where these cannot be.
        """
        if workers < 0 or seed < 0:
            raise ConfigError(f"workers={workers}, seed={seed}: expected 0 or more")
        for name, value in (("cache", cache), ("on_bad", on_bad)):
            if value not in _CHOICES[name]:
                raise ConfigError(f"{name}={value!r}: expected one of {_CHOICES[name]}")
        if workers and not can_fork():
            _logger.info("this system cannot fork: threads read the photos")
            workers = 0
        self.size = pixel_size(image_processor)
        self._skip, self._pin = on_bad == "skip", pin
        self._count = len(photos)
        lock: AbstractContextManager[Any] = threading.Lock()
        if workers:
            lock = get_context("fork").Lock()
        room = _room_of_one(image_processor, self.size)
        self._cache = cache_for(cache, len(photos), room, lock)
        self._photos = PhotoReader(photos, image_processor, self.size, augment, seed, self._cache)
        shape = (image_processor.in_channels, *self.size)
        self._pool = Pool(self._photos.fill, workers, shape, pin) if workers else None
        self._closed = False

    def __len__(self) -> int:
        """Photos of the set."""
        return self._count

    def __enter__(self) -> PhotoLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the reader's processes and lets its memory go. More than once does no harm."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()
        self._cache = self._photos.cache = None

    @property
    def cached(self) -> int:
        """Photos that are kept in memory, by this or any of its processes."""
        return 0 if self._cache is None else len(self._cache)

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """A batch of each plan, in order, as training sees it; plans are asked for a few ahead.

        Raises DataError for a photo that cannot be read, unless it is to be skipped, and TrainError
        where a reader process has ended.
        """
        return self._batches(plans, False)

    def evaluation_batches(
        self, batch_size: int, samples: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """All photos, or those of these numbers, in order, without augmentation: image_processor's
        own pixels, bit for bit. Errors as in batches."""
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected 1 or more")
        numbers = range(self._count) if samples is None else samples
        plans = (
            BatchPlan(0, step, tuple(map(int, numbers[start : start + batch_size])))
            for step, start in enumerate(range(0, len(numbers), batch_size))
        )
        return self._batches(plans, True)

    def _batches(self, plans: Iterable[BatchPlan], exact: bool) -> Iterator[Batch]:
        if self._closed:
            raise ConfigError("the reader is closed: make another")
        read = self._by_threads if self._pool is None else self._by_processes
        with closing(read(plans, exact)) as parts:
            for pixels, plan, failed in parts:
                if failed and not self._skip:
                    sample, why = failed[0]
                    raise DataError(
                        f"photo {sample} cannot be used: {why}. Mend it, leave it out, or skip "
                        "such photos (on_bad_image='skip', --on-bad-image skip)"
                    ) from ImageError(why)
                yield Batch(pixels, plan, failed)

    def _by_threads(
        self, plans: Iterable[BatchPlan], exact: bool
    ) -> Generator[tuple[torch.Tensor, BatchPlan, Failed], None, None]:
        """Each plan by threads, which go on with the next while who asked works."""
        photos = self._photos
        waiting: deque[tuple[BatchPlan, dict[int, Future[Pixels | str]]]] = deque()

        def oldest() -> tuple[torch.Tensor, BatchPlan, Failed]:
            plan, futures = waiting.popleft()
            shape = len(plan.samples), photos.processor.in_channels, *self.size
            pixels = empty_pixels(shape, self._pin)
            found = {sample: future.result() for sample, future in futures.items()}
            plan, failed = assemble(plan, found, pixels.numpy())
            return pixels[: len(plan.samples)], plan, failed

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="vitlib-read") as pool:
            try:
                for plan in plans:
                    tasks = {
                        s: pool.submit(photos.read, plan.epoch, s, exact) for s in needed(plan)
                    }
                    waiting.append((plan, tasks))
                    if len(waiting) > 1:
                        yield oldest()
                while waiting:
                    yield oldest()
            finally:
                for _, tasks in waiting:
                    for task in tasks.values():
                        task.cancel()

    def _by_processes(
        self, plans: Iterable[BatchPlan], exact: bool
    ) -> Generator[tuple[torch.Tensor, BatchPlan, Failed], None, None]:
        """Each plan by one of the processes, which go on with the next ones meanwhile."""
        assert self._pool is not None
        tickets: deque[int] = deque()
        try:
            for plan in plans:
                tickets.append(self._pool.submit(plan, exact))
                if len(tickets) == self._pool.ahead:
                    yield self._pool.take(tickets.popleft())
            while tickets:
                yield self._pool.take(tickets.popleft())
        finally:
            for ticket in tickets:
                self._pool.drop(ticket)


def _room_of_one(rule: ImageProcessor, size: tuple[int, int]) -> int:
    """Bytes that do for most photos: 4:3 and three times the pixels' side; and the very pixels."""
    pixels = size[0] * size[1] * (4 if rule.float_resize else 1)
    return rule.in_channels * (12 * min(size) ** 2 + pixels)
