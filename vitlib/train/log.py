"""What a run says of itself: metrics.jsonl, a line an event; metrics.csv, the same as a table.

A run that goes on after a kill keeps the lines up to its checkpoint, so that each step has one.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from vitlib.errors import ConfigError
from vitlib.system.atomic import open_atomic

LINES, TABLE = "metrics.jsonl", "metrics.csv"


class MetricsLog:
    """The files of a run; of a process that does not write, nothing."""

    def __init__(self, out: Path, writes: bool, tensorboard: bool) -> None:
        self.path, self.writes = out / LINES, writes
        self.table = out / TABLE
        self.events: list[dict[str, Any]] = []
        self.wants_board = writes and tensorboard
        self.board: Any = None
        if self.wants_board:
            _writer()  # that it is there is known before the run is

    def go_on_from(self, step: int) -> None:
        """Keep what was said up to a step; a line that a kill cut off goes."""
        if not self.writes:
            return
        if self.wants_board:
            self.board = _writer()(str(self.path.parent / "tensorboard"))
        self.events = [event for event in read_events(self.path) if event.get("step", 0) <= step]
        text = "".join(json.dumps(event) + "\n" for event in self.events)
        with open_atomic(self.path) as file:
            file.write(text.encode())

    def say(self, event: dict[str, Any]) -> None:
        """One line. Numbers that are none (NaN) become null."""
        if not self.writes:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                 for k, v in event.items()}  # fmt: skip
        self.events.append(clean)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        if self.board is not None:
            for key, value in clean.items():
                if isinstance(value, int | float) and key not in ("step", "epoch"):
                    self.board.add_scalar(f"{clean['event']}/{key}", value, clean["step"])

    def write_table(self) -> None:
        """metrics.csv, whole: a row an event, a column a number."""
        if not self.writes:
            return
        columns = list(dict.fromkeys(key for event in self.events for key in event))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.events)
        with open_atomic(self.table) as file:
            file.write(text.getvalue().encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Write what is held."""
        self.write_table()
        if self.board is not None:
            self.board.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; what is cut off is not there."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                found.append(event)
    return found


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard=true needs it: pip install 'vitlib[tensorboard]'") from error
    return SummaryWriter
