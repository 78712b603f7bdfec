"""Images decoded by threads, in order, a bounded number ahead of who takes them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from vitlib.errors import ImageError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
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
    threads = min(8, os.cpu_count() or 1)
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
