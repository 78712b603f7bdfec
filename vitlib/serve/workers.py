"""Several processes behind one socket: started, watched, ended together."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable

logger = logging.getLogger("vitlib")
PAUSE = 1.0  # seconds before a worker that died is replaced
QUICK = 5.0  # seconds: one that ends sooner never served


class Workers:
    """Forks `count` processes that each call `work`; before torch has made threads. ending: called
    in this one as soon as all are told to end."""

    def __init__(
        self, work: Callable[[], None], count: int, ending: Callable[[], None] = lambda: None
    ) -> None:
        self.work, self.count, self.ended = work, count, ending
        self.alive: dict[int, float] = {}  # process -> when it started
        self.ending = False

    def run(self, started: Callable[[], None]) -> None:
        """Until SIGTERM or SIGINT. Ends with status 1 where workers cannot start."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        for _ in range(self.count):
            self._start()
        started()
        while self.alive:
            self._wait()

    def _start(self) -> None:
        flush()
        process = os.fork()
        if process:
            self.alive[process] = time.monotonic()
            if self.ending:  # the signal came while it was made
                os.kill(process, signal.SIGTERM)
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        status = 1
        try:
            self.work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            logger.exception("a worker failed")
        finally:
            flush()
            os._exit(status)

    def _wait(self) -> None:
        try:
            process, _ = os.wait()
        except ChildProcessError:
            self.alive.clear()
            return
        born = self.alive.pop(process, None)
        if born is None or self.ending:
            return
        logger.warning("worker %d ended; another takes its place", process)
        if time.monotonic() - born < QUICK:
            time.sleep(PAUSE)
        self._start()

    def _end(self, *_: object) -> None:
        self.ending = True
        self.ended()
        for process in list(self.alive):
            try:
                os.kill(process, signal.SIGTERM)
            except ProcessLookupError:
                continue


def flush() -> None:
    """Write out what was printed, where there is a stdout and a stderr."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
