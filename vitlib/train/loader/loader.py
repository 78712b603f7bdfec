"""Batches of pixels for training: photos are read, cached, augmented, normalised and mixed.

How data flows: a photo is decoded upright. If it is far larger than the pixels, it is shrunk; the
result may be cached. It is augmented with random numbers of its (seed, epoch, sample) and
normalised by the model's own processor. A rectangle may be erased. Then it is mixed with its
partner, which is read in the same way with its own random numbers. So a sample's pixels depend on
(seed, epoch, sample) and its plan alone. Batch, thread, process and cache make no difference.

Shapes: B photos of a batch, C channels, H W pixels.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

import torch

from vitlib.data import LabelledPhotos
from vitlib.errors import ConfigError, DataError, ImageError
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.system.cores import count_cores
from vitlib.system.prefetch import prefetch
from vitlib.train.augment import Augment
from vitlib.train.loader.cache import create_cache
from vitlib.train.loader.photos import (
    Failed,
    PhotoReader,
    Pixels,
    assemble_batch,
    list_samples,
    pixel_size,
)
from vitlib.train.loader.pool import Pool, can_fork, empty_pixels
from vitlib.train.sampler import BatchPlan
from vitlib.train.settings import Runtime

_logger = logging.getLogger("vitlib")
_MAX_THREADS = 8  # that read photos in a process
_CHOICES = {"cache": ("auto", "memory", "none"), "on_bad": ("fail", "skip")}


@dataclass(frozen=True)
class Batch:
    """Pixels of one plan.

    Attributes:
        pixels: (B, C, H, W) float32.
        plan: Plan of these pixels, without samples that could not be read. A sample whose partner
            could not be read has a weight of 1.
        failed: (sample, reason) of each photo that could not be read, once.
    """

    pixels: torch.Tensor
    plan: BatchPlan
    failed: Failed = ()

    @property
    def samples(self) -> tuple[int, ...]:
        """Index of each photo in the set, B of them."""
        return self.plan.samples


class PhotoLoader:
    """Batches of pixels from photos, read ahead by threads or processes.

    `batches` is for training, `evaluation_batches` for evaluation. Both may be open at once, in one
    thread. Close the loader, or use it in a `with`: it may own processes.
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
        """Create a loader.

        Args:
            photos: Paths, or other images that image/decode.py reads.
            image_processor: The model's preprocessing; its pixels must all have one size.
            augment: Augmentation of training; None for image_processor's own pixels.
            seed: At least 0; augmentation is drawn from it, the epoch and the sample.
            workers: Number of processes; 0, or a system that cannot fork, for threads of this one.
            cache: Cache decoded photos in memory: "auto" in up to a quarter of the free memory,
                "memory" in up to nine tenths, "none" not. Others are decoded each time.
            on_bad: "fail" at a photo that cannot be read, or "skip" it and name it in the batch.
            pin: Return pixels in pinned memory, for asynchronous copies to a GPU.

        Raises:
            ConfigError: A value is out of range, or the processor has no fixed size.
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
        # The lock must come from the start method of the processes that share it.
        lock: AbstractContextManager[Any] = threading.Lock()
        if workers:
            lock = get_context("fork").Lock()
        bytes_per_photo = _bytes_per_photo(image_processor, self.size)
        self._cache = create_cache(cache, len(photos), bytes_per_photo, lock)
        self._reader = PhotoReader(photos, image_processor, self.size, augment, seed, self._cache)
        shape = (image_processor.in_channels, *self.size)
        self._pool = Pool(self._reader.fill_batch, workers, shape, pin) if workers else None
        self._closed = False

    def __len__(self) -> int:
        """Return the number of photos."""
        return self._count

    def __enter__(self) -> PhotoLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and free the cache; may be called again."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()
        self._cache = self._reader.cache = None

    @property
    def num_cached(self) -> int:
        """Arrays in the cache, by this or any of its processes."""
        return 0 if self._cache is None else len(self._cache)

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """Read plans with augmentation.

        Args:
            plans: Plans, of which a few are taken ahead.

        Returns:
            An iterator of one batch a plan, in order.

        Raises:
            DataError: A photo cannot be read, unless it is to be skipped.
            TrainError: A reader process has ended.
        """
        return self._batches(plans, False)

    def evaluation_batches(
        self, batch_size: int, samples: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Read photos without augmentation: image_processor's own pixels, to the bit.

        Args:
            batch_size: Photos of a batch, at least 1.
            samples: Indices of photos; None for all.

        Returns:
            An iterator of batches, in order.

        Raises:
            ConfigError: batch_size is below 1.
            DataError: A photo cannot be read, unless it is to be skipped.
            TrainError: A reader process has ended.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected 1 or more")
        numbers = range(self._count) if samples is None else samples
        plans = (
            BatchPlan(0, step, tuple(map(int, numbers[start : start + batch_size])))
            for step, start in enumerate(range(0, len(numbers), batch_size))
        )
        return self._batches(plans, True)

    def _batches(self, plans: Iterable[BatchPlan], exact: bool) -> Iterator[Batch]:
        """Yield a batch a plan; raise for unreadable photos unless they are skipped."""
        if self._closed:
            raise ConfigError("the loader is closed: make another")
        read = self._read_by_threads if self._pool is None else self._read_by_processes
        # closing(): a caller that stops early must not leave plans behind in the pool.
        with closing(read(plans, exact)) as parts:
            for pixels, plan, failed in parts:
                if failed and not self._skip:
                    sample, reason = failed[0]
                    raise DataError(
                        f"photo {sample} cannot be used: {reason}. Mend it, leave it out, or skip "
                        "such photos (on_bad_image='skip', --on-bad-image skip)"
                    ) from ImageError(reason)
                yield Batch(pixels, plan, failed)

    def _read_by_threads(
        self, plans: Iterable[BatchPlan], exact: bool
    ) -> Generator[tuple[torch.Tensor, BatchPlan, Failed], None, None]:
        """Read each plan by threads, one plan ahead of the caller."""
        reader = self._reader

        def submit(plan: BatchPlan) -> tuple[BatchPlan, dict[int, Future[Pixels | str]]]:
            samples = list_samples(plan)
            return plan, {s: pool.submit(reader.read, plan.epoch, s, exact) for s in samples}

        def cancel(handle: tuple[BatchPlan, dict[int, Future[Pixels | str]]]) -> None:
            for future in handle[1].values():
                future.cancel()

        threads = min(_MAX_THREADS, count_cores())
        # The prefetch is closed before the pool, which would else first read all pending photos.
        with (
            ThreadPoolExecutor(threads, thread_name_prefix="vitlib-read") as pool,
            closing(prefetch(plans, submit, cancel, limit=2)) as handles,
        ):
            for plan, futures in handles:
                shape = len(plan.samples), reader.processor.in_channels, *self.size
                pixels = empty_pixels(shape, self._pin)
                rows = {sample: future.result() for sample, future in futures.items()}
                part, failed = assemble_batch(plan, rows, pixels.numpy())
                yield pixels[: len(part.samples)], part, failed

    def _read_by_processes(
        self, plans: Iterable[BatchPlan], exact: bool
    ) -> Generator[tuple[torch.Tensor, BatchPlan, Failed], None, None]:
        """Read each plan by one of the processes, a few plans ahead of the caller."""
        pool = self._pool
        assert pool is not None

        def submit(plan: BatchPlan) -> int:
            return pool.submit(plan, exact)

        with closing(prefetch(plans, submit, pool.drop, limit=pool.ahead)) as tickets:
            for ticket in tickets:
                yield pool.take(ticket)


def _bytes_per_photo(rule: ImageProcessor, size: tuple[int, int]) -> int:
    """Return the memory of most photos: 4:3 at three times the side, and the pixels themselves."""
    pixels = size[0] * size[1] * (4 if rule.float_resize else 1)
    return rule.in_channels * (12 * min(size) ** 2 + pixels)


def create_loader(
    photos: LabelledPhotos,
    processor: ImageProcessor,
    augment: Augment | None,
    run: Runtime,
    pin: bool,
) -> PhotoLoader:
    """Create the loader of a set by the settings of a run.

    Args:
        photos: The set.
        processor: The model's preprocessing.
        augment: Augmentation; None for none.
        run: The settings.
        pin: Return pixels in pinned memory.

    Returns:
        The loader.
    """
    return PhotoLoader(
        [photo.path for photo in photos.photos],
        processor,
        augment,
        seed=run.seed,
        workers=run.dataloader_num_workers,
        cache=run.cache,
        on_bad=run.on_bad_image,
        pin=pin,
    )
