"""The folder of a report: whose it is, and how a new one takes its place whole.

metrics.json comes last, and while files are being exchanged a stub stands in its place that says
so: a report is one only where its metrics.json is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitlib.errors import SourceError, VitlibError
from vitlib.source.locate import read_json
from vitlib.system.atomic import replaceable

FORMAT, VERSION = "vitlib-evaluation", 1
METRICS, PREDICTIONS, PAGE = "metrics.json", "predictions.csv", "report.html"
TABLE, MATRIX, CALIBRATION = "accuracy_table.json", "confusion_matrix.json", "calibration.json"
PICTURES = (
    "confusion.png", "precision_recall.png", "roc.png", "reliability.png", "mistakes.png",
    "predicted.png", "errors.png",
)  # fmt: skip
OURS = (PREDICTIONS, PAGE, TABLE, MATRIX, CALIBRATION, *PICTURES)
_BESIDE = ".vitlib-report-"


def check_folder(out: Path) -> None:
    """Raise SourceError where `out` is no folder, or holds anything but a report."""
    try:
        there = [path.name for path in out.iterdir() if not path.name.startswith(_BESIDE)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise SourceError(
            f"{out} cannot be a folder for the report: {error.strerror or error}"
        ) from error
    if there and not is_report(out):
        raise SourceError(
            f"{out} holds {', '.join(sorted(there)[:3])}{', …' * (len(there) > 3)} and is no "
            "report of vitlib evaluate: name a new or an empty folder"
        )


def is_report(folder: Path) -> bool:
    """Whether a folder holds a report, whole or begun."""
    path = folder / METRICS
    try:
        return path.is_file() and read_json(path).get("format") == FORMAT
    except VitlibError:
        return False


@contextmanager
def report_folder(out: Path) -> Iterator[Path]:
    """A folder to write the files of a report into, which then take their names in `out`.

    Of a report that was there, files that the new one lacks go; files that are no report's stay.
    Raises SourceError where it cannot be written.
    """
    check_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=_BESIDE, dir=out))
        try:
            yield beside
            _exchange(beside, out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise SourceError(f"{out} cannot be written: {error.strerror or error}") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """JSON for people and programs; NaN, which it lacks, is to be None already."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_compact(path: Path, value: dict[str, Any]) -> None:
    """The same for programs alone, without spaces."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _exchange(beside: Path, out: Path) -> None:
    new = sorted(path for path in beside.iterdir() if path.name != METRICS)
    for path in (*new, beside / METRICS):
        replaceable(out / path.name)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # on the disk before it gets its name
    stub = beside / "stub"
    write_json(stub, {"format": FORMAT, "format_version": VERSION, "complete": False})
    stub.replace(out / METRICS)
    for name in OURS:
        if not (beside / name).exists():
            (out / name).unlink(missing_ok=True)
    for path in new:
        path.replace(out / path.name)
    (beside / METRICS).replace(out / METRICS)
