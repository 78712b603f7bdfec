"""A cache of arrays in memory that forked processes share: each photo is decoded once for all.

The memory is an anonymous map without a name or file. The system frees it when the last process
ends, however that process ends. Pages are taken only when they are first written.
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
_ALIGNMENT = 64  # bytes; a cache line, so that no float32 array starts at an odd address
_MEMORY_SHARES = {"auto": 0.25, "memory": 0.9}  # of the free memory


def shared_array(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Allocate zeros that processes forked later share.

    Args:
        shape: Shape of the array.
        dtype: Its dtype.

    Returns:
        The array.

    Raises:
        OSError: There is no such memory.
    """
    count = int(np.prod(shape, dtype=np.int64))
    memory = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1))
    return np.frombuffer(memory, dtype, count).reshape(shape)


class ArrayCache:
    """Arrays of three axes, uint8 or float32, by index, until the memory is full."""

    def __init__(self, num_entries: int, num_bytes: int, lock: AbstractContextManager[Any]) -> None:
        """Allocate an empty cache.

        Args:
            num_entries: Number of indices.
            num_bytes: Memory for all arrays together.
            lock: Excludes other threads, or other processes, during access.

        Raises:
            OSError: There is no such memory.
        """
        self._lock = lock
        # All three are shared, so that an entry that any process writes is seen by all.
        self._memory = shared_array((num_bytes,), np.uint8)
        self._used = shared_array((1,), np.int64)
        # A row an entry: start in memory, index of the dtype, three sides. Sides of 0: absent.
        self._table = shared_array((num_entries, 5), np.int64)

    def __len__(self) -> int:
        """Return the number of arrays in the cache."""
        return int(np.count_nonzero(self._table[:, 2]))

    def get(self, index: int) -> npt.NDArray[Any] | None:
        """Return an array of the cache.

        Args:
            index: Its entry.

        Returns:
            A read-only view; None if the entry is empty.
        """
        # Another process may be halfway through writing this row.
        with self._lock:
            start, dtype, *shape = self._table[index].tolist()
        if not shape[0]:
            return None
        # Read without the lock: an entry is never changed once its row is written.
        array = np.ndarray(shape, _DTYPES[dtype], self._memory.data, start)
        array.flags.writeable = False
        return array

    def put(self, index: int, array: npt.NDArray[Any]) -> None:
        """Copy an array into the cache, if it fits and the entry is empty.

        Args:
            index: Its entry.
            array: (h, w, C) uint8 or float32.
        """
        with self._lock:
            start = int(self._used[0])
            # Two processes may have read the same photo: the second copy is dropped.
            if self._table[index, 2] or start + array.nbytes > len(self._memory):
                return
            copy: npt.NDArray[Any] = np.ndarray(array.shape, array.dtype, self._memory.data, start)
            copy[:] = array
            self._used[0] = -(-(start + array.nbytes) // _ALIGNMENT) * _ALIGNMENT
            # The row last: a process killed before it leaves an empty entry, never half an array.
            self._table[index] = start, _DTYPES.index(array.dtype), *array.shape


def create_cache(
    kind: str, photos: int, bytes_per_photo: int, lock: AbstractContextManager[Any]
) -> ArrayCache | None:
    """Create a cache for a set of photos, with two entries for each.

    Args:
        kind: "auto" for up to a quarter of the free memory, "memory" for up to nine tenths, "none".
        photos: Number of photos.
        bytes_per_photo: Memory that one photo may need.
        lock: As in ArrayCache.

    Returns:
        The cache; None for "none", and for "auto" where no memory can be had.

    Raises:
        ConfigError: There is no memory for kind "memory".
    """
    if kind == "none" or not photos:
        return None
    num_bytes = photos * bytes_per_photo
    free = available_memory(torch.device("cpu"))
    if free is not None:
        # Every process that torchrun starts on this machine has a cache of its own.
        local = os.environ.get("LOCAL_WORLD_SIZE", "1")
        share = int(free * _MEMORY_SHARES[kind])
        num_bytes = min(num_bytes, share // max(int(local) if local.isdigit() else 1, 1))
    elif kind == "auto":
        return None
    try:
        return ArrayCache(2 * photos, num_bytes, lock)
    except (OSError, OverflowError) as error:
        if kind == "auto":
            return None
        raise ConfigError(f"cache='memory': no {num_bytes} bytes to be had; use 'auto'") from error
