"""Memory that a forward or a training step leaves to the next one, without a return to the system.

glibc returns a large block to the system as soon as it is freed. The system then fills each page of
the next block with zeros when it is first written. On a model's activations that takes up to a
seventh of a forward, and a tenth of a training step. See docs/performance.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

# Parameters of mallopt in <malloc.h> of glibc, and their defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD = 65536, 64 * 2**20
# Bytes of the largest block by whose size glibc adapts: 32 MiB with its header.
_LARGEST_BLOCK = 31 * 2**20


@lru_cache(maxsize=1)
def keep_small_blocks() -> None:
    """Let blocks of up to 31 MiB stay in the process when they are freed, from now on.

    glibc adapts to the sizes that a program frees: no later block of up to such a size gets a map
    of its own, and twice as many bytes may lie free before some return to the system. Here a block
    is freed of which no page was written, so that it costs nothing. A process whose limits were set
    by mallopt keeps them, and other C libraries are not affected.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


@contextmanager
def hold_heap() -> Iterator[None]:
    """Keep freed memory in the process while the context is open, then return it.

    It acts on the whole process, and on glibc alone: with other C libraries nothing happens.

    Yields:
        Nothing.
    """
    mallopt, trim = _glibc_function("mallopt"), _glibc_function("malloc_trim")
    if mallopt is None or trim is None:
        yield
        return
    keep_small_blocks()  # glibc stops to adapt after the first call of mallopt
    # Large blocks come from the heap too, not from maps of their own.
    mallopt(_MMAP_MAX, 0)
    # And the top of the heap is never returned.
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        trim(0)


def _glibc_function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; None for libraries and systems without it."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows does not load None
        return None
    return function
