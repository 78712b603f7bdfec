"""Heap memory that a step leaves to the next one, without returning it to the system.

glibc returns a large block to the system as soon as it is freed. The system then fills each page of
the next block with zeros when it is first written. On ViT-B/16 that takes a tenth of a step. See
docs/performance.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Parameters of mallopt in <malloc.h> of glibc, and their defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD = 65536, 64 * 2**20


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
