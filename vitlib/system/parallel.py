"""Compute one batch by several threads, each with its own part of the images."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier, Lock

import torch
from torch import Tensor


class ParallelCompute:
    """Split a batch among threads, each of which computes on one core.

    Where all threads share each matrix product, all wait for the slowest at each of hundreds of
    products, and on a busy machine they wait for most of the time. A few images are still computed
    by all threads together, which is faster for them.

    Use it as a context manager to end its threads.
    """

    def __init__(self, num_threads: int) -> None:
        """Prepare the threads, which the first large batch starts.

        Args:
            num_threads: Parts of a batch; 1 computes in the caller's thread as usual.
        """
        self.num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Lock()

    def run(self, compute: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Compute a batch; safe in any thread.

        Args:
            compute: (b, ...) -> (b, ...), row by row; called by several threads at once.
            batch: (B, ...).

        Returns:
            (B, ...), in the order of the batch.
        """
        if self.num_threads == 1 or len(batch) < 2 * self.num_threads:
            return compute(batch)
        pool = self._started_pool()
        futures = [pool.submit(compute, part) for part in batch.tensor_split(self.num_threads)]
        # Wait also after an error: the parts must not compute beside the next batch.
        wait(futures)
        return torch.cat([future.result() for future in futures])

    def _started_pool(self) -> ThreadPoolExecutor:
        """Return the pool, all of whose threads run."""
        with self._lock:
            if self._pool is None:
                before = torch.get_num_threads()
                pool = ThreadPoolExecutor(
                    self.num_threads, "vitlib-compute", initializer=_use_one_core
                )
                # The initializer also changes the number of the threads that the process starts
                # later. So all threads of the pool start at once, and the number is set back.
                barrier = Barrier(self.num_threads)
                try:
                    wait([pool.submit(barrier.wait) for _ in range(self.num_threads)])
                finally:
                    torch.set_num_threads(before)
                self._pool = pool
            return self._pool

    def __enter__(self) -> ParallelCompute:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _use_one_core() -> None:
    """Let this thread compute without helpers."""
    # The first call of a thread sets its number to the process's. Made later, it would undo the 1.
    torch.get_num_threads()
    torch.set_num_threads(1)
