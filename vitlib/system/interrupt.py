"""Ctrl-C that waits for work which must not end in its middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def defer_interrupt(enabled: bool) -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C, in place of a KeyboardInterrupt; the second raises it.

    Outside of the main thread, and where the program has a handler of its own for SIGINT, nothing
    changes.

    Args:
        enabled: False changes nothing.

    Yields:
        The event.
    """
    event = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not (enabled and is_main and previous is signal.default_int_handler):
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            signal.default_int_handler(number, frame)
        event.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
