"""Metrics of a run: metrics.jsonl, a line an event; metrics.csv, the same as a table.

A run that resumes drops the lines after its checkpoint, so that each step has exactly one line.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from vitlib.system.atomic import open_atomic
from vitlib.system.requirements import import_extra

LINES, TABLE = "metrics.jsonl", "metrics.csv"


class MetricsLog:
    """Writer of a run's metrics, in the first process alone."""

    def __init__(self, out: Path, writes: bool, tensorboard: bool) -> None:
        """Prepare a log; nothing is written before start().

        Args:
            out: Folder of the run.
            writes: True in the first process; in the others every method does nothing.
            tensorboard: Also write events for TensorBoard.

        Raises:
            ConfigError: TensorBoard is not installed.
        """
        self.path, self.writes = out / LINES, writes
        self.table = out / TABLE
        self.events: list[dict[str, Any]] = []
        self.uses_tensorboard = writes and tensorboard
        self.tensorboard: Any = None
        if self.uses_tensorboard:
            # Fails before the run rather than after its first step.
            _import_writer()

    def start(self, step: int) -> None:
        """Open the log, and drop the events after a step.

        Args:
            step: Steps taken before; 0 for a new run.
        """
        if not self.writes:
            return
        if self.uses_tensorboard:
            self.tensorboard = _import_writer()(str(self.path.parent / "tensorboard"))
        self.events = [event for event in read_events(self.path) if event.get("step", 0) <= step]
        text = "".join(json.dumps(event) + "\n" for event in self.events)
        with open_atomic(self.path) as file:
            file.write(text.encode())

    def write(self, event: dict[str, Any]) -> None:
        """Append an event.

        Args:
            event: Its "event" and "step", and any numbers. NaN and infinity become null.
        """
        if not self.writes:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                 for k, v in event.items()}  # fmt: skip
        self.events.append(clean)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        if self.tensorboard is not None:
            for key, value in clean.items():
                if isinstance(value, int | float) and key not in ("step", "epoch"):
                    self.tensorboard.add_scalar(f"{clean['event']}/{key}", value, clean["step"])

    def write_table(self) -> None:
        """Write metrics.csv anew: a row an event, a column a number."""
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
        """Write the table and close TensorBoard's file."""
        self.write_table()
        if self.tensorboard is not None:
            self.tensorboard.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read the events of a metrics.jsonl.

    Args:
        path: The file; it may be absent.

    Returns:
        The events, without a line that a kill has cut off.
    """
    events = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                events.append(event)
    return events


def _import_writer() -> Any:
    """Return TensorBoard's SummaryWriter, or raise ConfigError."""
    purpose = "tensorboard=true needs it"
    return import_extra(
        "tensorboard", "tensorboard", purpose, "torch.utils.tensorboard"
    ).SummaryWriter
