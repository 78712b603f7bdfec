"""Workers that take turns: a process for each side, which does one thing when asked and answers.

Thread pools of several libraries in one process fight for the cores; in processes of their own the
ones that wait are asleep. Orders and answers are lines of JSON. Standard library only: both sides
of the pipe import this, and they may be two interpreters with different packages.
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
# After an answer a library's threads may spin for some milliseconds: not into the next turn.
PAUSE = 0.03


class WorkerError(Exception):
    """A side that cannot take part, with its own words."""


class Worker:
    """The asking end of a side's process."""

    def __init__(self, python: str, script: Path, task: dict[str, Any], threads: int) -> None:
        self.started = time.perf_counter()
        # What it prints besides its answers; open as long as the worker lives.
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # Compiled files are written, as anywhere else: or each process would compile its imports.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, str(script), json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=environment,
        )
        self.answer()

    def age(self) -> float:
        """Seconds since it was started."""
        return time.perf_counter() - self.started

    def answer(self) -> Any:
        """The next answer. Raises WorkerError where the side failed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            last = [text for text in self.said.read().splitlines() if text.strip()]
            raise WorkerError(last[-1] if last else f"ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def ask(self, order: str, **values: Any) -> Any:
        """Have it do one thing and wait for what it answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": order, **values}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def watched(self, order: str, **values: Any) -> tuple[Any, float]:
        """The answer, and the most anonymous memory that it held meanwhile, MiB."""
        done, most = threading.Event(), [self.anonymous()]

        def look() -> None:
            while not done.wait(0.002):
                most[0] = max(most[0], self.anonymous())

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            return self.ask(order, **values), most[0]
        finally:
            done.set()
            watcher.join()

    def anonymous(self) -> float:
        """Anonymous memory that is resident, MiB: a counter, cheap to read; 0 off Linux."""
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0.0
        rows = dict(row.split(":", 1) for row in text.splitlines() if ":" in row)
        return int(rows.get("RssAnon", "0 kB").split()[0]) / 1024

    def mapped(self, folders: list[Path]) -> float:
        """Resident pages of files below these folders, not yet made its own, MiB."""
        try:
            rows = Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines()
        except OSError:
            return 0.0
        folders = [folder.resolve() for folder in folders]
        total, counts = 0, False
        for row in rows:
            first, *rest = row.split(None, 5)
            if not first.endswith(":"):  # a mapping's first line, its file at the end
                file = rest[4] if len(rest) > 4 else ""
                counts = any(file.startswith(f"{folder}/") for folder in folders)
            elif counts and first in ("Rss:", "Anonymous:"):
                total += int(rest[0]) * (1 if first == "Rss:" else -1)
        return total / 1024

    def end(self) -> None:
        """Let it go, and wait until its memory is free."""
        self.process.kill()
        self.process.wait()
        self.said.close()


def serve(make: Callable[[dict[str, Any]], object]) -> None:
    """The answering end: make a side of the task on the command line, then do as told.

    Whatever a library prints goes to stderr, so that nothing stands among the answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(work: Callable[[], Any]) -> bool:
        try:
            said = {"result": work()}
        except Exception as error:  # any of any library: the asking end decides
            first = " ".join(str(error).split())[:200]
            said = {"error": f"{type(error).__name__}: {first}"}
        print(json.dumps(said), file=answers, flush=True)
        return "error" not in said

    made: list[Any] = []
    if not answer(lambda: made.append(make(json.loads(sys.argv[1])))):
        return
    for line in sys.stdin:
        order = json.loads(line)
        answer(lambda order=order: getattr(made[0], order.pop("do"))(**order))  # type: ignore[misc]


def in_turns(
    sides: dict[str, Callable[[], Any]], rounds: int, warmup: int, failed: dict[str, str]
) -> dict[str, list[Any]]:
    """What each side's turns gave, a list by rounds; those of the warm-up do not count.

    Every other round goes backwards, so that no side always follows the same one. A side that fails
    has no further turns and no list: `failed` says why.
    """
    given: dict[str, list[Any]] = {name: [] for name in sides}
    for count in range(warmup + rounds):
        for name in list(given)[:: 1 if count % 2 else -1]:
            time.sleep(PAUSE)
            try:
                answer = sides[name]()
            except WorkerError as error:
                failed[name] = str(error)
                del given[name]
                continue
            if count >= warmup:
                given[name].append(answer)
    return given
