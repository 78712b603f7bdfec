"""Compute one batch by several threads, each with its own part of the images."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor


class ParallelCompute:
    """Split a batch among threads, each of which computes on one core.

    Where all threads share each matrix product, all wait for the slowest at each of hundreds of
    products. A few images are still computed by all threads together, which is faster for them.

    One thread may call run() at a time, and no other thread of the process may compute.
    """

    def __init__(self, num_threads: int) -> None:
        """Start the threads.

        Args:
            num_threads: Parts of a batch; 1 computes in the caller's thread as usual.
        """
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(
            max(1, num_threads - 1), "vitlib-compute", initializer=_use_one_core
        )

    def run(self, compute: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Compute a batch.

        Args:
            compute: (b, ...) -> (b, ...), row by row; called by several threads at once.
            batch: (B, ...).

        Returns:
            (B, ...), in the order of the batch.
        """
        if self.num_threads == 1 or len(batch) < 2 * self.num_threads:
            return compute(batch)
        first, *rest = batch.tensor_split(self.num_threads)
        futures = [self._pool.submit(compute, part) for part in rest]
        # The caller's thread computes the first part, on one core like the threads of the pool.
        torch.set_num_threads(1)
        try:
            rows = compute(first)
            return torch.cat([rows, *(future.result() for future in futures)])
        finally:
            # Wait also after an error: the parts must not compute beside the next batch.
            wait(futures)
            torch.set_num_threads(self.num_threads)


def _use_one_core() -> None:
    """Let this thread compute without helpers."""
    torch.set_num_threads(1)
