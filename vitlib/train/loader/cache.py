"""Arrays kept in memory that forked processes share: whoever reads a photo first keeps it for all.

The memory belongs to no file and has no name: it is the system's own again when the last process
that has it ends, however that ends. Pages are taken only as they are written.
"""

from __future__ import annotations

import mmap
import os
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vitlib.errors import ConfigError
from vitlib.system.memory import available_memory

_DTYPES = (np.dtype(np.uint8), np.dtype(np.float32))
_ALIGNED = 64  # bytes
_PARTS = {"auto": 0.25, "memory": 0.9}  # of the memory that is free


def shared_array(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of zeros that processes forked later share. Raises OSError if none can be."""
    count = int(np.prod(shape, dtype=np.int64))
    memory = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1))
    return np.frombuffer(memory, dtype, count).reshape(shape)


class ArrayCache:
    """Arrays of three axes, uint8 or float32, each at a place of its own, as long as there is room.

    What does not fit is not kept. Raises OSError where the memory is not to be had.
    """

    def __init__(self, places: int, room: int, lock: AbstractContextManager[Any]) -> None:
        """`room` is in bytes; `lock` keeps threads or processes out of each other's way."""
        self._lock = lock
        self._memory = shared_array((room,), np.uint8)
        self._used = shared_array((1,), np.int64)
        # Of each place: where its array starts, which dtype it is, and its three sides; 0: none.
        self._rows = shared_array((places, 5), np.int64)

    def __len__(self) -> int:
        """Arrays that are kept."""
        return int(np.count_nonzero(self._rows[:, 2]))

    def get(self, place: int) -> npt.NDArray[Any] | None:
        """What was put there, not to be written to; None where nothing was."""
        with self._lock:  # another process may be writing the row
            start, kind, *shape = self._rows[place].tolist()
        if not shape[0]:
            return None
        found = np.ndarray(shape, _DTYPES[kind], self._memory.data, start)
        found.flags.writeable = False
        return found

    def put(self, place: int, array: npt.NDArray[Any]) -> None:
        """Keeps a copy, if there is room and nothing there yet."""
        with self._lock:
            start = int(self._used[0])
            if self._rows[place, 2] or start + array.nbytes > len(self._memory):
                return
            kept: npt.NDArray[Any] = np.ndarray(array.shape, array.dtype, self._memory.data, start)
            kept[:] = array
            self._used[0] = -(-(start + array.nbytes) // _ALIGNED) * _ALIGNED
            self._rows[place] = start, _DTYPES.index(array.dtype), *array.shape


def cache_for(
    kind: str, photos: int, bytes_a_photo: int, lock: AbstractContextManager[Any]
) -> ArrayCache | None:
    """A cache for a set, two places a photo, as large as memory allows; None where none is to be.

    `kind` is "auto" (up to a quarter of what is free), "memory" (nine tenths) or "none". Raises
    ConfigError where "memory" is not to be had.
    """
    if kind == "none" or not photos:
        return None
    room = photos * bytes_a_photo
    free = available_memory(torch.device("cpu"))
    if free is not None:
        # Processes of one machine, as torchrun counts them, each have a cache.
        local = os.environ.get("LOCAL_WORLD_SIZE", "1")
        room = min(room, int(free * _PARTS[kind]) // max(int(local) if local.isdigit() else 1, 1))
    elif kind == "auto":
        return None
    try:
        return ArrayCache(2 * photos, room, lock)
    except (OSError, OverflowError) as error:
        if kind == "auto":
            return None
        raise ConfigError(f"cache='memory': no {room} bytes to be had; use 'auto'") from error
