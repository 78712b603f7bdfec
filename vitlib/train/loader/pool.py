"""Reader processes: they read micro-batches in order, a bounded number ahead.

They are forked. So photos and cache are shared rather than copied, and a script needs no guard
around its main part. Pixels come back through shared memory. torch's DataLoader is not used, for
three reasons. It needs /dev/shm, which containers keep too small for a batch of pixels. It raises
the death of a process in the middle of unrelated code. It reads one sequence at a time, but an
evaluation may run in the middle of an epoch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vitlib.errors import TrainError
from vitlib.train.loader.cache import shared_array
from vitlib.train.loader.photos import Failed
from vitlib.train.sampler import BatchPlan

# (plan, without augmentation, rows to fill) -> the plan of these rows, and unreadable photos.
FillBatch: TypeAlias = Callable[
    [BatchPlan, bool, npt.NDArray[np.float32]], tuple[BatchPlan, Failed]
]

AHEAD = 2  # plans of a process: the one it reads, and the next
# A process allocates and frees a block of this many bytes at its start. That raises glibc's limit
# above which it returns freed blocks to the system. Below the limit, the memory of every photo
# would be taken anew, page by page, which is a third of the time of reading.
_HEAP_BLOCK = 30 << 20
_POLL_SECONDS = 2.0  # between two checks that the parent process is alive


def can_fork() -> bool:
    """Return True if processes can be forked; on macOS forking breaks system libraries."""
    return sys.platform != "darwin" and "fork" in multiprocessing.get_all_start_methods()


def empty_pixels(shape: tuple[int, ...], pin: bool) -> torch.Tensor:
    """Allocate pixels.

    Args:
        shape: (B, C, H, W).
        pin: In pinned memory, for asynchronous copies to a GPU.

    Returns:
        Uninitialised float32 pixels.
    """
    return torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pin)


class Pool:
    """Reader processes, for use from one thread.

    Each submitted plan gets a ticket. The batches of tickets can be taken in any order.
    """

    def __init__(
        self, fill: FillBatch, workers: int, shape: tuple[int, int, int], pin: bool = False
    ) -> None:
        """Create a pool; processes start with the first plan.

        Args:
            fill: Reads a plan; runs in the processes.
            workers: Number of processes.
            shape: (C, H, W) of a photo's pixels.
            pin: take() returns pixels in pinned memory.
        """
        self._pin = pin
        self._fill, self._workers, self._shape = fill, workers, shape
        self._open = True
        self._capacity = 0  # rows of a slot
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        # (workers, AHEAD, capacity, C, H, W). A process fills its slots in turn. It has at most
        # AHEAD plans, and a plan is copied out before the next is sent, so no slot is overwritten
        # before it is read.
        self._slots: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self._sent: list[deque[int]] = [deque() for _ in range(workers)]  # tickets, oldest first
        self._done: dict[int, tuple[torch.Tensor, BatchPlan, Failed]] = {}
        self._dropped: set[int] = set()
        self._num_tickets = 0

    @property
    def ahead(self) -> int:
        """Number of plans that are worth submitting before the first is taken."""
        return AHEAD * self._workers

    def submit(self, plan: BatchPlan, exact: bool) -> int:
        """Submit a plan; wait while its process has enough of them.

        Args:
            plan: The plan.
            exact: Without augmentation.

        Returns:
            The ticket for take() or drop().

        Raises:
            TrainError: A process has ended.
        """
        if self._open and (len(plan.samples) > self._capacity or not self._processes):
            self._start(len(plan.samples))
        ticket, worker = self._num_tickets, self._num_tickets % self._workers
        while len(self._sent[worker]) >= AHEAD:
            self._receive(worker)
        self._check_open()
        try:
            self._pipes[worker].send((plan, exact))
        except OSError as error:
            raise self._close_dead(worker) from error
        self._sent[worker].append(ticket)
        self._num_tickets += 1
        return ticket

    def take(self, ticket: int) -> tuple[torch.Tensor, BatchPlan, Failed]:
        """Wait for the batch of a ticket.

        Args:
            ticket: From submit().

        Returns:
            Pixels (B, C, H, W), the plan of these rows, and the photos that could not be read.

        Raises:
            TrainError: A process has ended.
        """
        while ticket not in self._done:
            self._receive(ticket % self._workers)
        return self._done.pop(ticket)

    def drop(self, ticket: int) -> None:
        """Discard the batch of a ticket, read or not.

        Args:
            ticket: From submit().
        """
        if self._done.pop(ticket, None) is None:
            self._dropped.add(ticket)

    def close(self) -> None:
        """End the processes for good."""
        self._open = False
        self._kill()

    def _kill(self) -> None:
        """Kill the processes: they hold no state that is not elsewhere."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        self._pipes, self._processes = [], []

    def _start(self, capacity: int) -> None:
        """Fork processes for plans of this many photos, after all pending plans are read."""
        for worker, sent in enumerate(self._sent):
            while sent:
                self._receive(worker)
        self._kill()
        self._capacity = max(capacity, self._capacity, 1)
        try:
            shape = (self._workers, AHEAD, self._capacity, *self._shape)
            self._slots = shared_array(shape, np.float32)
        except (OSError, OverflowError) as error:
            raise TrainError(
                f"no memory for {self._workers} reader processes with batches of "
                f"{self._capacity}: use fewer, or smaller batches"
            ) from error
        context = multiprocessing.get_context("fork")
        for slots in self._slots:
            parent_end, child_end = context.Pipe()
            process = context.Process(
                target=_serve, args=(self._fill, child_end, slots, os.getpid()), daemon=True
            )
            with warnings.catch_warnings():
                # Python warns that locks of other threads stay locked in a forked process. The
                # child takes none of those locks: it only decodes, with one thread.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            # With this copy open, a dead child would not close the pipe, and recv() would hang.
            child_end.close()
            self._pipes.append(parent_end)
            self._processes.append(process)

    def _receive(self, worker: int) -> None:
        """Copy the oldest plan of a process out of its slot."""
        self._check_open()
        pipe = self._pipes[worker]
        # Wait for the death of any process too: one that dies in a lock blocks all others.
        while pipe not in wait([pipe, *(process.sentinel for process in self._processes)]):
            for other, process in enumerate(self._processes):
                if process.exitcode is not None:
                    raise self._close_dead(other)
        try:
            plan, failed, slot = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._close_dead(worker) from error
        ticket = self._sent[worker].popleft()
        if ticket in self._dropped:
            self._dropped.remove(ticket)
            return
        filled = self._slots[worker, slot, : len(plan.samples)]
        pixels = empty_pixels(filled.shape, self._pin)
        np.copyto(pixels.numpy(), filled)
        self._done[ticket] = pixels, plan, failed

    def _check_open(self) -> None:
        """Raise TrainError if the pool is closed."""
        if not self._open:
            raise TrainError("the loader is closed, or one of its processes has ended")

    def _close_dead(self, worker: int) -> TrainError:
        """Close the pool after a process has died, and return the error to raise."""
        process = self._processes[worker]
        process.join(_POLL_SECONDS)
        pid, code = process.pid, process.exitcode
        cause = f"ended with status {code}" if code is None or code >= 0 else "was killed by "
        if code is not None and code < 0:
            cause += signal.Signals(-code).name
        self.close()
        return TrainError(
            f"loader process {pid} {cause}: perhaps memory ran out; use fewer reader processes, or "
            "no cache"
        )


def _serve(
    fill: FillBatch, pipe: Connection, slots: npt.NDArray[np.float32], parent_pid: int
) -> None:
    """Run a reader process until its parent closes the pipe or ends."""
    # The parent handles Ctrl+C and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    np.empty(_HEAP_BLOCK, np.uint8)
    slot = 0
    try:
        while True:
            # A killed parent does not always close the pipe: later siblings inherit its end of it.
            # Then the parent of this process changes.
            while not pipe.poll(_POLL_SECONDS):
                if os.getppid() != parent_pid:
                    return
            plan, exact = pipe.recv()
            readable, failed = fill(plan, exact, slots[slot])
            pipe.send((readable, failed, slot))
            slot = (slot + 1) % AHEAD
    except (EOFError, OSError):
        return
