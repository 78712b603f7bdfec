"""The local engine: batches of inputs -> answers, in order, by this process or several.

On a CPU the threads read some batches, then the model computes them: a model whose cores are taken
waits for the slowest. On a GPU the next batches are read meanwhile. Nothing is held but the batches
on their way, whatever the number of inputs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

import torch

from vitlib.batch.answer import Answer
from vitlib.batch.items import Item
from vitlib.batch.work import Read, Worker
from vitlib.errors import BatchError

Batch = list[Item]
AT_ONCE = 4  # batches that are read before they are computed: the last image of them is waited for
ON_ITS_WAY = 3  # batches of a process


def here(worker: Worker, batches: Iterable[Batch], threads: int) -> Iterator[Answer]:
    """By this process."""
    several = AT_ONCE
    ahead = 0 if worker.ready.device.type == "cpu" else several
    left = iter(batches)
    waiting: deque[tuple[Batch, list[Future[Read]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="vitlib-read") as pool:
        try:
            while True:
                for batch in islice(left, several + ahead - len(waiting)):
                    waiting.append((batch, [pool.submit(worker.read, item) for item in batch]))
                if not waiting:
                    return
                some = [waiting.popleft() for _ in range(min(several, len(waiting)))]
                wait([future for _, futures in some for future in futures])
                for batch, futures in some:
                    yield worker.answer(batch, [future.result() for future in futures])
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()


def processes(
    make: Callable[[int], Worker], batches: Iterable[Batch], count: int, threads: int
) -> Iterator[Answer]:
    """By several processes. make: makes the worker in a process, told its number; can be pickled.

    Raises BatchError where a process dies.
    """
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(count):
        numbers.put(number)
    left = iter(batches)
    waiting: deque[tuple[Batch, Future[Answer]]] = deque()
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_begin, initargs=(make, numbers, threads)
    )
    try:
        while True:
            for batch in islice(left, ON_ITS_WAY * count - len(waiting)):
                waiting.append((batch, pool.submit(_answer, batch)))
            if not waiting:
                return
            batch, future = waiting.popleft()
            try:
                yield future.result()
            except BrokenProcessPool as error:
                raise BatchError(
                    f"a worker process died at rows {batch[0].row} and after (killed, or out of "
                    "memory: --workers or --batch-size lower takes less); what is done is kept: "
                    "give the same command again"
                ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: list[Worker] = []  # of this process


def _begin(make: Callable[[int], Worker], numbers: object, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker.append(make(numbers.get()))  # type: ignore[attr-defined]


def _end_with_parent() -> None:
    """A main process that is killed cannot say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(batch: Batch) -> Answer:
    worker = _worker[0]
    threads = torch.get_num_threads()
    if threads == 1 and worker.ready.device.type == "cpu":
        return worker.answer(batch, [worker.read(item) for item in batch])
    with ThreadPoolExecutor(threads) as pool:
        return worker.answer(batch, list(pool.map(worker.read, batch)))


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
