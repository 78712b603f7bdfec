"""A progress bar, where one is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    total: int | None, shown: bool, unit: str = "image"
) -> Iterator[Callable[[int], object]]:
    """A bar on stderr where it is to be shown; yields what to call with each count done."""
    if not shown or sys.stderr is None:  # None under pythonw, or where it was closed
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, leave=False) as drawn:
        yield drawn.update
