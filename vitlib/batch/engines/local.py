"""The local engine: batches of inputs -> answers, in order, by this process or several.

On a CPU each core reads a batch and computes it, by itself: where all cores share a product they
wait for the slowest of them, at each of a model's hundreds. So a row's bits do not depend on the
number of cores. On a GPU threads read while it computes. Nothing is held but the batches on their
way, whatever the number of inputs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import Any

import torch

from vitlib.batch.inputs.items import Item
from vitlib.batch.results import Answer
from vitlib.batch.worker import Worker
from vitlib.errors import BatchError
from vitlib.system.prefetch import prefetch

Batch = list[Item]
ANSWERING = 2  # threads that give batches to a GPU
AHEAD = 3  # batches for each that computes: one is computed, the others wait for it
BATCH_SIZE = 8  # on a CPU: as many as its caches hold, and the last ones keep a core alone shortly


def here(worker: Worker, batches: Iterable[Batch]) -> Generator[Answer, None, None]:
    """By this process: a CPU's cores, or its GPU."""
    if worker.engine.device.type == "cpu":
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(cores(), "vitlib-core", initializer=_alone) as pool:
                yield from in_turn(pool, lambda batch: _answered(worker, batch), batches, cores())
        finally:
            torch.set_num_threads(threads)  # of those that come later, too
        return

    def answer(batch: Batch) -> Answer:
        return worker.answer(batch, [read.result() for read in reads.pop(id(batch))])

    def with_reads() -> Iterator[Batch]:
        for batch in batches:
            reads[id(batch)] = [pool.submit(worker.read, item) for item in batch]
            yield batch

    reads: dict[int, list[Future[Any]]] = {}
    # While one thread waits for the GPU's answer the other gives it the next batch.
    with (
        ThreadPoolExecutor(cores(), "vitlib-read") as pool,
        ThreadPoolExecutor(ANSWERING, "vitlib-answer") as pair,
    ):
        try:
            yield from in_turn(pair, answer, with_reads(), ANSWERING)
        finally:
            for read in [read for several in [*reads.values()] for read in several]:
                read.cancel()


def in_turn(
    pool: Executor, answer: Callable[[Batch], Answer], batches: Iterable[Batch], count: int
) -> Generator[Answer, None, None]:
    """Yield the answers of batches in order, AHEAD batches a computing thread or process ahead."""

    def submit(batch: Batch) -> Future[Answer]:
        return pool.submit(answer, batch)

    with closing(prefetch(batches, submit, Future.cancel, limit=AHEAD * count)) as futures:
        for future in futures:
            yield future.result()


def _alone() -> None:
    torch.set_num_threads(1)


def _answered(worker: Worker, batch: Batch) -> Answer:
    return worker.answer(batch, [worker.read(item) for item in batch])


def processes(
    make: Callable[[int], Worker], batches: Iterable[Batch], count: int
) -> Generator[Answer, None, None]:
    """By several processes, each with a core or a GPU. make: makes the worker in a process, told
    its number; can be pickled.

    Raises BatchError where a process dies.
    """
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(count):
        numbers.put(number)
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_begin, initargs=(make, numbers, count)
    )
    try:
        yield from in_turn(pool, _answer, batches, count)
    except BrokenProcessPool as error:
        raise BatchError(
            "a worker process died (killed, or out of memory: --workers or --batch-size lower "
            "takes less); what is done is kept: give the same command again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: list[Worker] = []  # of this process
_readers: list[ThreadPoolExecutor] = []


def _begin(make: Callable[[int], Worker], numbers: Any, count: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker.append(make(numbers.get()))
    if _worker[0].engine.device.type != "cpu":
        _readers.append(ThreadPoolExecutor(max(1, cores() // count)))


def _end_with_parent() -> None:
    """A main process that is killed cannot say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(batch: Batch) -> Answer:
    worker = _worker[0]
    if not _readers:
        return _answered(worker, batch)
    return worker.answer(batch, list(_readers[0].map(worker.read, batch)))


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
