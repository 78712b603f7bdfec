"""The processes that train together: one, or those that torchrun started.

What is said to all goes through here; a process alone pays nothing for it.
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
    """Which of how many processes this is, and where it computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # a constant

    @property
    def first(self) -> bool:
        """The one that writes files and speaks."""
        return self.rank == 0

    def to_device(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device of this process.

        From the CPU to a GPU it goes through pinned memory, which torch keeps until the copy is
        done, so that the process does not wait.
        """
        if self.device.type != "cuda" or not tensor.is_cpu or not tensor.numel():
            return tensor.to(self.device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def read(self, losses: Sequence[Tensor], norm: Tensor) -> tuple[float, float]:
        """Read a step's numbers from the device, all at once, as each read waits for the device.

        Args:
            losses: Of each pass, (), at least one.
            norm: Of the gradients, (), the same in every process.

        Returns:
            The sum of all processes' losses, in float64; and the norm.
        """
        if self.size == 1:
            *values, length = torch.stack([*losses, norm]).cpu().tolist()
            return sum(values), length
        total = reduce(torch.add, [loss.double() for loss in losses])
        dist.all_reduce(total)
        loss, length = torch.stack([total, norm.double()]).cpu().tolist()
        return loss, length

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, at every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    @contextmanager
    def first_does(self) -> Iterator[bool]:
        """Yields whether this is the one to do it; what goes wrong there goes wrong everywhere."""
        error: Exception | None = None
        if self.first:
            try:
                yield True
            except Exception as raised:
                error = raised
        else:
            yield False
        told = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        if told[0] is not None:
            raise TrainError(told[0])


@contextmanager
def joined(device: torch.device | str | None) -> Iterator[World]:
    """The processes of this run, joined while it lasts. device: None takes CUDA where it is.

    Raises TrainError where torchrun's variables do not make sense.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        many = dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
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
    # The device, so that NCCL connects at once and a barrier does not guess it.
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=chosen if on_gpu else None)
    try:
        yield World(rank, size, chosen)
        # What holds the group goes before it, and no process while another still asks it: else
        # threads of the group may outlive it, which aborts the process.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()
