"""Images decoded by threads, in order, a bounded number ahead of who takes them; and answered in
batches of one size."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from typing import Literal, TypeVar

import torch
from torch import Tensor

from vitlib.errors import ConfigError, ImageError, NotFiniteError
from vitlib.image.decode import ImageLike, is_one_image, iter_images
from vitlib.scores import NOT_FINITE, check_count
from vitlib.system.progress import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")
Images = ImageLike | Iterable[ImageLike]
MAX_THREADS = 32  # that decode; a GPU takes what tens of cores decode
OnError = Literal["raise", "none"] | Callable[[int, ImageError], object]


def prefetch_map(
    items: Iterable[Item],
    read: Callable[[Item], Result],
    failed: Callable[[int, ImageError], None],
    *,
    at_once: int,
    ahead: int = 0,
) -> Iterator[Result | None]:
    """What `read` makes of each item, by threads: `at_once` of them, then `ahead` more while who
    asked works. Of an image that cannot be read, `failed` is told (index, error); where it raises
    nothing, None stands in its place."""

    def result(index: int, future: Future[Result]) -> Result | None:
        try:
            return future.result()
        except ImageError as error:
            failed(index, error)
            return None

    waiting: deque[tuple[int, Future[Result]]] = deque()
    numbered = enumerate(items)
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="vitlib-decode") as pool:
        try:
            while True:
                for index, item in islice(numbered, at_once + ahead - len(waiting)):
                    waiting.append((index, pool.submit(read, item)))
                if not waiting:
                    return
                for _ in range(min(at_once, len(waiting))):
                    yield result(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()


def map_batches(
    images: Images,
    read: Callable[[ImageLike], Tensor],
    ask: Callable[[Tensor], Iterable[Result]],
    device: torch.device,
    batch_size: int,
    on_error: OnError,
    progress: bool,
) -> Iterator[Result | None]:
    """What `ask` says of each image, in order, a batch of one size at a time.

    read: one image -> (C, H, W). ask: (B, C, H, W) -> an answer for each. device: what computes; on
    a GPU the next batch is decoded meanwhile. on_error: "raise" raises ImageError, which names a
    bad image and its index; "none", or a function that is told (index, error), leaves None in its
    place.
    """
    if on_error not in ("raise", "none") and not callable(on_error):
        raise ConfigError(f"on_error={on_error!r}: expected 'raise', 'none' or a function")
    check_count("batch_size", batch_size)
    single, items = is_one_image(images), iter_images(images)
    total = len(items) if isinstance(items, Sized) else None
    ahead = batch_size if device.type == "cuda" else 0
    with progress_bar(total, progress) as advance:
        told = partial(_told, on_error, single)
        decoded = prefetch_map(items, read, told, at_once=batch_size, ahead=ahead)
        index = 0  # of the first image of a group
        while batch := list(islice(decoded, batch_size)):
            for kind, group in groupby(batch, key=_kind):
                members = list(group)
                if kind is None:
                    yield from [None] * len(members)
                else:
                    yield from _finite(ask(stack(members, device)), index, told)  # type: ignore[arg-type]
                index += len(members)
            advance(len(batch))


def _finite(
    rows: Iterable[Result], first: int, failed: Callable[[int, ImageError], None]
) -> Iterator[Result | None]:
    """Rows of numbers, in order; of one that is not finite `failed` is told (index, error), and
    None stands in its place."""
    if not isinstance(rows, Tensor) or bool(rows.isfinite().all()):
        yield from rows
        return
    for index, row in enumerate(rows, first):
        if bool(row.isfinite().all()):
            yield row
        else:
            told = f"{NOT_FINITE}: leave the image out, or load with dtype=torch.float32"
            failed(index, NotFiniteError(told))
            yield None


def stack(images: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack images for the device that computes.

    Args:
        images: (C, H, W) each, on the CPU, of one shape and dtype.
        device: What computes.

    Returns:
        (B, C, H, W) on the CPU; for a GPU in pinned memory, which it copies from by itself.
    """
    if device.type != "cuda":
        return torch.stack(list(images))
    shape = len(images), *images[0].shape
    pinned = torch.empty(shape, dtype=images[0].dtype, device="cpu", pin_memory=True)
    return torch.stack(list(images), out=pinned)


def _kind(image: Tensor | None) -> object:
    """What images of one batch have in common; None: a bad one."""
    return None if image is None else (image.dtype, image.shape)


def _told(on_error: OnError, single: bool, index: int, error: ImageError) -> None:
    """Raise what is wrong with an image, or tell it, or let it pass, as on_error says."""
    if on_error == "raise":
        raise error if single else ImageError(f"image {index}: {error}") from error
    if callable(on_error):
        on_error(index, error)
