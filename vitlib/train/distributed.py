"""The processes that train together: one alone, or those that torchrun started.

All communication of a run goes through World, except the averaging of gradients by DDP or FSDP. A
process alone communicates nothing.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from vitlib.errors import TrainError


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, and the device of this one.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.
        device: Device on which this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # a constant

    @property
    def is_first(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    def to_device(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device of this process.

        Args:
            tensor: A tensor on any device.

        Returns:
            The tensor on the device.
        """
        if self.device.type != "cuda" or not tensor.is_cpu or not tensor.numel():
            return tensor.to(self.device)
        # torch keeps pinned memory alive until the copy is done. So the copy runs while the process
        # queues the next kernels; from pageable memory it would wait.
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def read_step(self, losses: Sequence[Tensor], norm: Tensor) -> tuple[float, float]:
        """Read a step's loss and gradient norm from the device, with one wait for it.

        Args:
            losses: Loss of each micro-batch of this process, (), at least one.
            norm: Norm of the gradients, (), the same in every process.

        Returns:
            The sum of all processes' losses, in float64; and the norm.
        """
        if self.size == 1:
            *values, norm_value = torch.stack([*losses, norm]).cpu().tolist()
            return sum(values), norm_value
        total = reduce(torch.add, [loss.double() for loss in losses])
        dist.all_reduce(total)
        loss, norm_value = torch.stack([total, norm.double()]).cpu().tolist()
        return loss, norm_value

    def all_gather(self, value: Any) -> list[Any]:
        """Collect a value of every process in every process.

        Args:
            value: Any value that pickle can write.

        Returns:
            The values, by rank.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def on_first(self) -> Iterator[bool]:
        """Run a block in the first process; its exception is raised in every process.

        Without that exchange the other processes would wait forever for a failed one.

        Yields:
            True in the first process, which does the work of the block.

        Raises:
            TrainError: The first process failed, raised in the others.
        """
        error: Exception | None = None
        if self.is_first:
            try:
                yield True
            except Exception as raised:
                error = raised
        else:
            yield False
        messages = self.all_gather(None if error is None else str(error))
        if error is not None:
            raise error
        if messages[0] is not None:
            raise TrainError(messages[0])


@contextmanager
def join_processes(device: torch.device | str | None) -> Iterator[World]:
    """Join the processes of this run while the context is open.

    A process group that the caller has made is used and left open.

    Args:
        device: Device of this process; None for CUDA where there is a GPU. With torchrun the index
            of a GPU is LOCAL_RANK.

    Yields:
        The world.

    Raises:
        TrainError: WORLD_SIZE is set, but RANK or LOCAL_RANK is missing or no number.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        has_group = dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if has_group else (0, 1)
        yield World(rank, size, chosen)
        return
    try:
        rank, size, local = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise TrainError(
            "WORLD_SIZE is set, but RANK and LOCAL_RANK are no numbers: start with torchrun"
        ) from error
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    on_gpu = chosen.type == "cuda"
    # With the device, NCCL connects at once, and a barrier does not guess the device.
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=chosen if on_gpu else None)
    try:
        yield World(rank, size, chosen)
        # Objects that refer to the group must die before it, and no process may leave while another
        # still uses the group. Else threads of the group outlive it, and the process aborts.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()
