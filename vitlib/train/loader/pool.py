"""Processes that read micro-batches, in order, a bounded number ahead of who takes them.

They are forked, so what they share with this one (photos, their cache) is not copied, and a script
needs no guard around its main part. Pixels come back through memory that both have. torch's
DataLoader would do the same by way of /dev/shm, which containers keep too small for a batch of
pixels, would raise the end of a process in the middle of whatever the caller is doing, and reads
one sequence at a time, where an evaluation may fall into an epoch.
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

# (plan, whether without augmentation, rows to fill) -> what of the plan was read, what was not.
Fill: TypeAlias = Callable[[BatchPlan, bool, npt.NDArray[np.float32]], tuple[BatchPlan, Failed]]

AHEAD = 2  # plans that a process has: one it reads, and the next
# Bytes of a block that a process takes and lets go at once. Before it has seen one, glibc hands all
# blocks as large as a photo back to the system and takes them anew, page by page, which is a third
# of the time of reading.
_LARGE = 30 << 20
_ALIVE = 2.0  # seconds between looks at whether who asks is still there


def can_fork() -> bool:
    """Whether processes can be forked here; on macOS that breaks the system's own libraries."""
    return sys.platform != "darwin" and "fork" in multiprocessing.get_all_start_methods()


def empty_pixels(shape: tuple[int, ...], pin: bool) -> torch.Tensor:
    """Allocate pixels (B, C, H, W) float32, in pinned memory where `pin` is set."""
    return torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pin)


class Pool:
    """PhotoLoader processes. To be used from one thread.

    Each plan that is submitted gets a ticket, for which its pixels are taken, in any order.
    """

    def __init__(
        self, fill: Fill, workers: int, shape: tuple[int, int, int], pin: bool = False
    ) -> None:
        """`fill` runs in `workers` processes; a photo's pixels are of `shape` (C, H, W).

        pin: whether take() gives pixels in pinned memory.
        """
        self._pin = pin
        self._fill, self._workers, self._shape = fill, workers, shape
        self._open = True
        self._capacity = 0  # rows of a slot
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._slots: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self._sent: list[deque[int]] = [deque() for _ in range(workers)]  # tickets, oldest first
        self._done: dict[int, tuple[torch.Tensor, BatchPlan, Failed]] = {}
        self._unwanted: set[int] = set()
        self._tickets = 0

    @property
    def ahead(self) -> int:
        """Plans that are worth submitting before the first is taken."""
        return AHEAD * self._workers

    def submit(self, plan: BatchPlan, exact: bool) -> int:
        """Has a plan read; waits while its process has enough to do. Raises TrainError as take."""
        if self._open and (len(plan.samples) > self._capacity or not self._processes):
            self._start(len(plan.samples))
        ticket, worker = self._tickets, self._tickets % self._workers
        while len(self._sent[worker]) >= AHEAD:
            self._receive(worker)
        self._check_open()
        try:
            self._pipes[worker].send((plan, exact))
        except OSError as error:
            raise self._ended(worker) from error
        self._sent[worker].append(ticket)
        self._tickets += 1
        return ticket

    def take(self, ticket: int) -> tuple[torch.Tensor, BatchPlan, Failed]:
        """The pixels (B, C, H, W) of a plan, what of it they are, and what could not be read.

        Raises TrainError where a process has ended.
        """
        while ticket not in self._done:
            self._receive(ticket % self._workers)
        return self._done.pop(ticket)

    def drop(self, ticket: int) -> None:
        """Nobody will take it."""
        if self._done.pop(ticket, None) is None:
            self._unwanted.add(ticket)

    def close(self) -> None:
        """Ends the processes, for good."""
        self._open = False
        self._end()

    def _end(self) -> None:
        """Ends the processes: they hold nothing that is not elsewhere."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        self._pipes, self._processes = [], []

    def _start(self, capacity: int) -> None:
        """Fork, with room for plans of so many photos; what is under way is waited for."""
        for worker, sent in enumerate(self._sent):
            while sent:
                self._receive(worker)
        self._end()
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
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(self._fill, theirs, slots, os.getpid()), daemon=True
            )
            with warnings.catch_warnings():
                # Python warns that other threads' locks stay locked in a forked process. What runs
                # there takes none of theirs: it decodes, with one thread.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _receive(self, worker: int) -> None:
        """Take the oldest plan that a process was sent out of its slot."""
        self._check_open()
        pipe = self._pipes[worker]
        while pipe not in wait([pipe, *(process.sentinel for process in self._processes)]):
            for other, process in enumerate(self._processes):
                if process.exitcode is not None:
                    raise self._ended(other)
        try:
            plan, failed, slot = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended(worker) from error
        ticket = self._sent[worker].popleft()
        if ticket in self._unwanted:
            self._unwanted.remove(ticket)
            return
        filled = self._slots[worker, slot, : len(plan.samples)]
        pixels = empty_pixels(filled.shape, self._pin)
        np.copyto(pixels.numpy(), filled)
        self._done[ticket] = pixels, plan, failed

    def _check_open(self) -> None:
        if not self._open:
            raise TrainError("the reader is closed, or one of its processes has ended")

    def _ended(self, worker: int) -> TrainError:
        """The error for a process that is no more."""
        process = self._processes[worker]
        process.join(_ALIVE)
        pid, code = process.pid, process.exitcode
        how = f"ended with status {code}" if code is None or code >= 0 else "was killed by "
        if code is not None and code < 0:
            how += signal.Signals(-code).name
        self.close()
        return TrainError(
            f"reader process {pid} {how}: perhaps memory ran out; use fewer reader processes, or "
            "no cache"
        )


def _serve(fill: Fill, pipe: Connection, slots: npt.NDArray[np.float32], asking: int) -> None:
    """A reader process's life: until who asks, of that process id, is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    np.empty(_LARGE, np.uint8)
    slot = 0
    try:
        while True:
            while not pipe.poll(_ALIVE):
                if os.getppid() != asking:
                    return
            plan, exact = pipe.recv()
            read, failed = fill(plan, exact, slots[slot])
            pipe.send((read, failed, slot))
            slot = (slot + 1) % AHEAD
    except (EOFError, OSError):
        return
