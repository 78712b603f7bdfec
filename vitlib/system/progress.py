"""Progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def above_bars() -> Iterator[None]:
    """Remove the progress bars while a line is printed on stderr, and draw them again below it.

    Yields:
        Nothing.
    """
    # Without tqdm no bar was drawn.
    if "tqdm" not in sys.modules:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        yield


@contextmanager
def progress_bar(
    total: int | None, visible: bool, unit: str = "image"
) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on stderr.

    Args:
        total: Number of units; None if it is not known.
        visible: False shows nothing.
        unit: What is counted, in the singular.

    Yields:
        A function to call with the number of units done since the last call.
    """
    # None under pythonw, or where it was closed.
    if not visible or sys.stderr is None:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, leave=False) as drawn:
        yield drawn.update
