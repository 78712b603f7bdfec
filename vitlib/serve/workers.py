"""Several processes behind one socket: start, restart and end them together."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable

logger = logging.getLogger("vitlib")
RESTART_DELAY = 1.0  # seconds before a worker that fails at its start is replaced
MIN_LIFETIME = 5.0  # seconds; a worker that ends sooner has failed at its start


class Workers:
    """Forks processes that share the parent's sockets, and replaces those that die.

    The parent must not have started torch's threads: a fork copies only the calling thread.
    """

    def __init__(
        self, work: Callable[[], None], count: int, on_end: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare the workers, without starting them.

        Args:
            work: Runs in each process; the process ends when it returns.
            count: The number of processes.
            on_end: Called in the parent once all workers are asked to end.
        """
        self.work, self.count, self.on_end = work, count, on_end
        self.start_times: dict[int, float] = {}  # of live processes, by process id
        self.is_ending = False

    def run(self, on_start: Callable[[], None]) -> None:
        """Run the workers until SIGTERM or SIGINT.

        Args:
            on_start: Called in the parent when all workers are started.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        for _ in range(self.count):
            self._start()
        on_start()
        while self.start_times:
            self._wait()

    def _start(self) -> None:
        """Fork a worker. The child does not return from here."""
        # Else the child writes the parent's buffered output again.
        flush_output()
        process = os.fork()
        if process:
            self.start_times[process] = time.monotonic()
            # The signal came during the fork, before the child was listed.
            if self.is_ending:
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
            flush_output()
            # Without the exit handlers, which belong to the parent.
            os._exit(status)

    def _wait(self) -> None:
        """Wait until a worker ends, and start another in its place."""
        try:
            process, _ = os.wait()
        except ChildProcessError:
            self.start_times.clear()
            return
        start = self.start_times.pop(process, None)
        if start is None or self.is_ending:
            return
        logger.warning("worker %d ended; another takes its place", process)
        if time.monotonic() - start < MIN_LIFETIME:
            time.sleep(RESTART_DELAY)
        self._start()

    def _end(self, *_: object) -> None:
        """Ask all workers to end; the handler of SIGTERM and SIGINT."""
        self.is_ending = True
        self.on_end()
        for process in list(self.start_times):
            try:
                os.kill(process, signal.SIGTERM)
            except ProcessLookupError:
                continue


def flush_output() -> None:
    """Flush stdout and stderr, where the process has them."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
