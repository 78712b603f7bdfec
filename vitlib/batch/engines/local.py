"""Local engine: batches of inputs -> results, in order, by this process or several.

On a CPU each core decodes and computes a batch alone. Cores that share a matrix product would wait
for the slowest of them at each of a model's hundreds of products. So the bits of a row do not
depend on the number of cores. On a GPU threads decode while it computes. Only the batches in
progress are in memory, whatever the number of inputs.
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
from vitlib.batch.results import Results
from vitlib.batch.worker import Worker
from vitlib.errors import BatchError
from vitlib.system.cores import count_cores
from vitlib.system.prefetch import prefetch

Batch = list[Item]
GPU_THREADS = 2  # that give batches to a GPU
AHEAD = 3  # batches for each thread or process: one is computed, the others wait
BATCH_SIZE = 8  # on a CPU: fits its caches, and the last batch occupies a single core briefly


def run_local(worker: Worker, batches: Iterable[Batch]) -> Generator[Results, None, None]:
    """Compute batches in this process, on the cores of a CPU or on a GPU.

    Args:
        worker: the model.
        batches: consecutive inputs.

    Yields:
        The results of each batch, in order.
    """
    if worker.engine.device.type == "cpu":
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(
                count_cores(), "vitlib-core", initializer=_use_one_thread
            ) as pool:
                yield from map_in_order(
                    pool, lambda batch: _compute(worker, batch), batches, count_cores()
                )
        finally:
            # The initializer changes the number for the threads that start later, too.
            torch.set_num_threads(threads)
        return

    def compute(batch: Batch) -> Results:
        return worker.compute_items(batch, [image.result() for image in images.pop(id(batch))])

    def decode_ahead() -> Iterator[Batch]:
        for batch in batches:
            images[id(batch)] = [pool.submit(worker.decode, item) for item in batch]
            yield batch

    images: dict[int, list[Future[Any]]] = {}
    # While one thread waits for results of the GPU, the other gives it the next batch.
    with (
        ThreadPoolExecutor(count_cores(), "vitlib-decode") as pool,
        ThreadPoolExecutor(GPU_THREADS, "vitlib-compute") as pair,
    ):
        try:
            yield from map_in_order(pair, compute, decode_ahead(), GPU_THREADS)
        finally:
            for future in [future for futures in [*images.values()] for future in futures]:
                future.cancel()


def map_in_order(
    pool: Executor, compute: Callable[[Batch], Results], batches: Iterable[Batch], count: int
) -> Generator[Results, None, None]:
    """Compute batches in a pool, a bounded number ahead.

    Args:
        pool: threads or processes.
        compute: function of a batch.
        batches: the batches.
        count: threads or processes of the pool.

    Yields:
        The results, in the order of the batches.
    """

    def submit(batch: Batch) -> Future[Results]:
        return pool.submit(compute, batch)

    with closing(prefetch(batches, submit, Future.cancel, limit=AHEAD * count)) as futures:
        for future in futures:
            yield future.result()


def _use_one_thread() -> None:
    """Let this thread compute matrix products alone."""
    torch.set_num_threads(1)


def _compute(worker: Worker, batch: Batch) -> Results:
    """Decode and compute a batch in this thread."""
    return worker.compute_items(batch, [worker.decode(item) for item in batch])


def run_processes(
    make: Callable[[int], Worker], batches: Iterable[Batch], count: int
) -> Generator[Results, None, None]:
    """Compute batches in several processes, each with its share of the cores or a GPU.

    Args:
        make: function of a process's number that makes its worker; it can be pickled.
        batches: consecutive inputs.
        count: number of processes.

    Yields:
        The results of each batch, in order.

    Raises:
        BatchError: where a process dies.
    """
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(count):
        numbers.put(number)
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start_worker, initargs=(make, numbers, count)
    )
    try:
        yield from map_in_order(pool, _compute_here, batches, count)
    except BrokenProcessPool as error:
        raise BatchError(
            "a worker process died (killed, or out of memory: --workers or --batch-size lower "
            "takes less); finished rows are kept: run the same command again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# The worker of this process, and the threads that decode for its GPU.
_worker: list[Worker] = []
_readers: list[ThreadPoolExecutor] = []


def _start_worker(make: Callable[[int], Worker], numbers: Any, count: int) -> None:
    """Make the worker of this process."""
    # Control-C reaches every process of the terminal; only the main one acts on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker.append(make(numbers.get()))
    if _worker[0].engine.device.type != "cpu":
        _readers.append(ThreadPoolExecutor(max(1, count_cores() // count)))


def _end_with_parent() -> None:
    """End this process with the main one, which cannot end it when it is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _compute_here(batch: Batch) -> Results:
    """Compute a batch by the worker of this process."""
    worker = _worker[0]
    if not _readers:
        return _compute(worker, batch)
    return worker.compute_items(batch, list(_readers[0].map(worker.decode, batch)))
