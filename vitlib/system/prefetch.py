"""Bounded prefetch: work is submitted ahead of its consumer, and taken in order.

One loop serves every reader of the package: threads that decode images (image/prefetch.py), the
cores and processes of batch inference (batch/engines/local.py), and the threads and processes that
read training photos (train/loader/loader.py). They differ in what they submit and how they wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Handle = TypeVar("Handle")


def prefetch(
    items: Iterable[Item],
    submit: Callable[[Item], Handle],
    cancel: Callable[[Handle], object],
    *,
    limit: int,
    chunk: int = 1,
) -> Generator[Handle, None, None]:
    """Submit items ahead of the consumer and yield their handles in order.

    Close the generator to cancel what was not yielded: `with closing(prefetch(...)) as handles`.
    The garbage collector would do so only later, where a traceback keeps the generator alive.

    Args:
        items: Items, taken one by one, at most `limit` ahead.
        submit: Starts the work on an item and returns its handle, such as a Future.
        cancel: Cancels the work of a handle that is not yielded, such as Future.cancel.
        limit: Most handles that are submitted and not yielded, at least 1.
        chunk: Handles that are yielded before more items are submitted, 1..limit. With chunk=limit
            nothing is submitted while the consumer works on a chunk.

    Yields:
        A handle an item. The consumer waits for its result.
    """
    remaining = iter(items)
    pending: deque[Handle] = deque()
    try:
        while True:
            for item in islice(remaining, limit - len(pending)):
                pending.append(submit(item))
            if not pending:
                return
            for _ in range(min(chunk, len(pending))):
                yield pending.popleft()
    finally:
        for handle in pending:
            cancel(handle)
