"""Run each library in a worker process and interleave their measurements.

Thread pools of several libraries in one process compete for the cores. In separate processes the
idle libraries sleep. Requests and replies are lines of JSON. This module uses only the standard
library: both ends of the pipe import it, possibly from interpreters with different packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
# Seconds before each turn: a library's threads may spin for some milliseconds after a call.
PAUSE = 0.03


class WorkerError(Exception):
    """Failure of a worker, with the worker's own message."""


class Worker:
    """Client of a worker process.

    Args:
        python: Interpreter of the worker.
        script: Script that calls serve().
        task: JSON values for the script.
        threads: OMP_NUM_THREADS of the worker.

    Raises:
        WorkerError: The worker failed to start.
    """

    def __init__(self, python: str, script: Path, task: dict[str, Any], threads: int) -> None:
        self.started = time.perf_counter()
        # The worker's stderr. The file stays open until close().
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # Let Python cache bytecode; otherwise each process would compile its imports.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, str(script), json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.read_reply()

    def seconds_since_start(self) -> float:
        """Return the seconds since the process was started."""
        return time.perf_counter() - self.started

    def read_reply(self) -> Any:
        """Read the next reply.

        Raises:
            WorkerError: The request failed, or the process ended.
        """
        assert self.process.stdout is not None
        reply_line = self.process.stdout.readline()
        if not reply_line:
            self.log.seek(0)
            lines = [line for line in self.log.read().splitlines() if line.strip()]
            raise WorkerError(lines[-1] if lines else f"exited with code {self.process.wait()}")
        reply = json.loads(reply_line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the worker's object and return its result."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"method": method, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.read_reply()

    def call_with_peak(self, method: str, **arguments: Any) -> tuple[Any, float]:
        """Call a method; return its result and the peak anonymous memory in MiB."""
        done, peak = threading.Event(), [self.anonymous_mib()]

        def poll() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], self.anonymous_mib())

        poller = threading.Thread(target=poll)
        poller.start()
        try:
            return self.call(method, **arguments), peak[0]
        finally:
            done.set()
            poller.join()

    def anonymous_mib(self) -> float:
        """Return the resident anonymous memory in MiB; 0 on systems other than Linux.

        /proc/PID/status is a counter that is cheap to read.
        """
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0.0
        rows = dict(row.split(":", 1) for row in text.splitlines() if ":" in row)
        return int(rows.get("RssAnon", "0 kB").split()[0]) / 1024

    def mapped_mib(self, folders: list[Path]) -> float:
        """Return the MiB of resident, unmodified pages of files in some folders."""
        try:
            rows = Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines()
        except OSError:
            return 0.0
        folders = [folder.resolve() for folder in folders]
        total, is_counted = 0, False
        for row in rows:
            first, *rest = row.split(None, 5)
            if not first.endswith(":"):  # first line of a mapping; it ends with the file
                file = rest[4] if len(rest) > 4 else ""
                is_counted = any(file.startswith(f"{folder}/") for folder in folders)
            elif is_counted and first in ("Rss:", "Anonymous:"):
                total += int(rest[0]) * (1 if first == "Rss:" else -1)
        return total / 1024

    def close(self) -> None:
        """Kill the process and wait until its memory is free."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def serve(make: Callable[[dict[str, Any]], object]) -> None:
    """Run a worker: build its object from the task on the command line, then answer requests.

    Output of libraries goes to stderr, so that stdout has only replies.

    Args:
        make: Builds the object from the task.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def run_and_reply(work: Callable[[], Any]) -> bool:
        try:
            reply = {"result": work()}
        except Exception as error:  # any error of a library: the client handles it
            message = " ".join(str(error).split())[:200]
            reply = {"error": f"{type(error).__name__}: {message}"}
        print(json.dumps(reply), file=replies, flush=True)
        return "error" not in reply

    objects: list[Any] = []
    if not run_and_reply(lambda: objects.append(make(json.loads(sys.argv[1])))):
        return
    for line in sys.stdin:
        request = json.loads(line)
        run_and_reply(lambda request=request: getattr(objects[0], request.pop("method"))(**request))  # type: ignore[misc]


def interleave(
    calls: dict[str, Callable[[], Any]], rounds: int, warmup: int, failed: dict[str, str]
) -> dict[str, list[Any]]:
    """Call several functions in turns, round after round, and collect their results.

    Every other round runs in reverse order, so that no call always follows the same one.

    Args:
        calls: Function of each name.
        rounds: Rounds whose results are kept.
        warmup: Rounds before them, whose results are dropped.
        failed: Receives the message of each WorkerError by name. A failed call gets no further
            turns.

    Returns:
        Results by name, one for each round; without the failed names.
    """
    results: dict[str, list[Any]] = {name: [] for name in calls}
    for round_index in range(warmup + rounds):
        for name in list(results)[:: 1 if round_index % 2 else -1]:
            time.sleep(PAUSE)
            try:
                result = calls[name]()
            except WorkerError as error:
                failed[name] = str(error)
                del results[name]
                continue
            if round_index >= warmup:
                results[name].append(result)
    return results
