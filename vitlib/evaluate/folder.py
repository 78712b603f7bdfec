"""Folder of a report: recognise one, and replace an earlier one as a whole.

metrics.json is written last. While files are exchanged, a stub with "complete": false stands in its
place, so that a killed run leaves no folder that looks like a complete report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitlib.errors import SourceError, VitlibError
from vitlib.source.locate import read_json
from vitlib.system.atomic import replace_files, staging_folder

FORMAT, VERSION = "vitlib-evaluation", 1
METRICS, PREDICTIONS, PAGE = "metrics.json", "predictions.csv", "report.html"
TABLE, MATRIX, CALIBRATION = "accuracy_table.json", "confusion_matrix.json", "calibration.json"
PICTURES = (
    "confusion.png", "precision_recall.png", "roc.png", "reliability.png", "mistakes.png",
    "predicted.png", "errors.png",
)  # fmt: skip
REPORT_FILES = (PREDICTIONS, PAGE, TABLE, MATRIX, CALIBRATION, *PICTURES)
_STAGING = ".vitlib-report-"  # prefix of the folder that new files are written to


def check_folder(out: Path) -> None:
    """Check that a report can be written to `out`.

    Args:
        out: folder of the report.

    Raises:
        SourceError: where `out` is not a folder, or holds anything but a report.
    """
    try:
        names = [path.name for path in out.iterdir() if not path.name.startswith(_STAGING)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise SourceError(
            f"{out} cannot be a folder for the report: {error.strerror or error}"
        ) from error
    if names and not is_report(out):
        raise SourceError(
            f"{out} holds {', '.join(sorted(names)[:3])}{', …' * (len(names) > 3)} and is no "
            "report of vitlib evaluate: name a new or an empty folder"
        )


def is_report(folder: Path) -> bool:
    """Return True if a folder holds a report, complete or not.

    Args:
        folder: the folder to read.

    Returns:
        True if its metrics.json says that it belongs to a report.
    """
    path = folder / METRICS
    try:
        return path.is_file() and read_json(path).get("format") == FORMAT
    except VitlibError:
        return False


@contextmanager
def report_folder(out: Path) -> Iterator[Path]:
    """Yield a staging folder whose files replace those of the report in `out` at the end.

    Files of an earlier report that the new one lacks are deleted. Other files of `out` stay.

    Args:
        out: folder of the report, made where it is absent.

    Yields:
        The staging folder, within `out`.

    Raises:
        SourceError: where `out` cannot be written.
    """
    check_folder(out)
    with staging_folder(out, _STAGING) as staging:
        yield staging
        stub = {"format": FORMAT, "format_version": VERSION, "complete": False}
        stale = [name for name in REPORT_FILES if not (staging / name).exists()]
        replace_files(
            staging, out, last=METRICS, stale=stale, stub=json.dumps(stub, indent=2).encode()
        )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON.

    Args:
        path: the file to write.
        value: the content, without NaN, which JSON lacks.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_compact(path: Path, value: dict[str, Any]) -> None:
    """Write JSON without spaces, for programs.

    Args:
        path: the file to write.
        value: the content, without NaN.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
