"""Memory of a step that the next one takes again, without asking the system for it.

A large block goes back to the system when it is freed, and each page of the next one is filled with
zeros when first written: on ViT-B/16 a tenth of a step. See docs/performance.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# <malloc.h> of glibc: names of its parameters, and what they are where nobody has set them.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_MMAP_MAX_DEFAULT, _TRIM_AFTER = 65536, 64 * 2**20


@contextmanager
def hold_heap() -> Iterator[None]:
    """While this is open, memory that is freed stays with the process; then it goes back.

    Of the whole process and of glibc only: elsewhere nothing happens.
    """
    mallopt, trim = _glibc("mallopt"), _glibc("malloc_trim")
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
        mallopt(_TRIM_THRESHOLD, _TRIM_AFTER)
        trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, which other libraries and systems do not have."""
    try:
        return getattr(ctypes.CDLL(None), name)  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of that kind
        return None
