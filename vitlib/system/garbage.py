"""Pause of Python's garbage collector while objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Python 3.12 counts its own few hundred immortal objects as frozen. A program that called
# gc.freeze() has thousands.
MAX_IMMORTAL = 2000


@contextmanager
def pause_collection(*, permanent: bool = False) -> Iterator[None]:
    """Pause the garbage collector in a block, and count what the block makes as old.

    Importing torch and vitlib makes 300,000 objects that live as long as the process. The collector
    would walk them several times, which takes a tenth of a start.

    Args:
        permanent: Exempt all objects of the process from later collections too. A program may do
            so, a library may not: garbage of its caller would stay.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # Without freeze() the collection after enable() would walk all objects of the block. After
        # freeze() and unfreeze() they are in the oldest generation, and no object was walked.
        # unfreeze() would also release what the caller froze.
        if permanent or gc.get_freeze_count() < MAX_IMMORTAL:
            gc.freeze()
            if not permanent:
                gc.unfreeze()
        gc.enable()
