"""Decode images ahead by threads, and run them through a model in batches of one shape.

How data flows: map_batches() takes images, prefetch_map() decodes them by threads in order, and
images of one shape and dtype are stacked into batches. The model's results come back one an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby, islice
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from vitlib.errors import ConfigError, ImageError, NotFiniteError
from vitlib.image.decode import ImageLike, is_one_image, iter_images
from vitlib.scores import NOT_FINITE, check_count
from vitlib.system.prefetch import prefetch
from vitlib.system.progress import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")
Images = ImageLike | Iterable[ImageLike]
MAX_THREADS = 32  # that decode: a GPU takes as many images as tens of cores decode
OnError = Literal["raise", "none"] | Callable[[int, ImageError], object]


def prefetch_map(
    items: Iterable[Item],
    read: Callable[[Item], Result],
    report: Callable[[int, ImageError], None],
    *,
    batch_size: int,
    ahead: int = 0,
) -> Iterator[Result | None]:
    """Map a function over items by threads, in order.

    Args:
        items: Items to read.
        read: Reads an item; runs in threads.
        report: Called with the index of an item and its ImageError. If it returns, the result of
            that item is None.
        batch_size: Items that are read at once, at least 1.
        ahead: More items that are read while the caller works on a batch.

    Yields:
        The result of each item, in order; None for an item that could not be read.
    """
    from vitlib.system.cores import count_cores  # one photo needs no threads

    threads = min(MAX_THREADS, count_cores())
    with ThreadPoolExecutor(threads, thread_name_prefix="vitlib-decode") as pool:

        def submit(item: Item) -> Future[Result]:
            return pool.submit(read, item)

        limit = batch_size + ahead
        ordered = prefetch(items, submit, Future.cancel, limit=limit, chunk=batch_size)
        # Closed before the pool, which else would first read all items that are pending.
        with closing(ordered) as futures:
            for index, future in enumerate(futures):
                try:
                    result: Result | None = future.result()
                except ImageError as error:
                    report(index, error)
                    result = None
                yield result


def map_batches(
    images: Images,
    read: Callable[[ImageLike], Tensor],
    run: Callable[[Tensor], Iterable[Result]],
    device: torch.device,
    batch_size: int,
    on_error: OnError,
    progress: bool,
) -> Iterator[Result | None]:
    """Run a model on images, in batches of images of one shape.

    Args:
        images: One image or several.
        read: Reads an image as (C, H, W); runs in threads.
        run: Maps a batch (B, C, H, W) to one result an image.
        device: Device of the model. On a GPU the next batch is decoded meanwhile. On a CPU it is
            not: decoding and inference share the cores.
        batch_size: Most images of a batch, at least 1.
        on_error: "raise" raises the ImageError of a bad image, with its index. "none" yields None
            for it. A function is called with (index, error), then None is yielded.
        progress: True shows a progress bar on stderr.

    Yields:
        The result of each image, in order; None for a bad image.

    Raises:
        ConfigError: batch_size or on_error has another value.
        ImageError: An image is bad and on_error is "raise", or `images` is no image.
    """
    if on_error not in ("raise", "none") and not callable(on_error):
        raise ConfigError(f"on_error={on_error!r}: expected 'raise', 'none' or a function")
    check_count("batch_size", batch_size)
    single, items = is_one_image(images), iter_images(images)
    total = len(items) if isinstance(items, Sized) else None
    # A GPU leaves the cores free: they decode one more batch meanwhile.
    ahead = batch_size if device.type == "cuda" else 0
    with progress_bar(total, progress) as advance:
        report = partial(_report, on_error, single)
        decoded = prefetch_map(items, read, report, batch_size=batch_size, ahead=ahead)
        index = 0  # of the first image of a group
        while batch := list(islice(decoded, batch_size)):
            # Images of another shape, as rules without a crop give them, are batches of their own.
            for kind, group in groupby(batch, key=_shape_and_dtype):
                members = list(group)
                if kind is None:
                    yield from [None] * len(members)
                else:
                    yield from _check_finite(run(stack(members, device)), index, report)  # type: ignore[arg-type]
                index += len(members)
            advance(len(batch))


def _check_finite(
    rows: Iterable[Result], first: int, report: Callable[[int, ImageError], None]
) -> Iterator[Result | None]:
    """Yield rows of numbers; report a row that is not finite and yield None in its place."""
    if not isinstance(rows, Tensor) or bool(rows.isfinite().all()):
        yield from rows
        return
    for index, row in enumerate(rows, first):
        if bool(row.isfinite().all()):
            yield row
        else:
            remedy = "leave the image out, or load with dtype=torch.float32"
            report(index, NotFiniteError(f"{NOT_FINITE}: {remedy}"))
            yield None


def stack(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack images for the device of the model.

    Args:
        images: (C, H, W) each, on the CPU, of one shape and dtype.
        device: Device that will compute.

    Returns:
        (B, C, H, W) on the CPU. For a GPU it is in pinned memory, from which a copy does not block.
    """
    shape, pinned = (len(images), *images[0].shape), device.type == "cuda"
    batch = torch.empty(shape, dtype=images[0].dtype, device="cpu", pin_memory=pinned)
    # By NumPy: torch.stack wakes a thread on each core, which then spin for milliseconds where the
    # cores are busy, more than the copy of a batch takes.
    np.stack([image.numpy() for image in images], out=batch.numpy())
    return batch


def _shape_and_dtype(image: Tensor | None) -> object:
    """Return a key that images of one batch share; None for a bad image."""
    return None if image is None else (image.dtype, image.shape)


def _report(on_error: OnError, single: bool, index: int, error: ImageError) -> None:
    """Raise the error of an image, pass it to a function, or ignore it, as on_error says."""
    if on_error == "raise":
        raise error if single else ImageError(f"image {index}: {error}") from error
    if callable(on_error):
        on_error(index, error)
