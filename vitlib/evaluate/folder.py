"""Folder of a report: recognise one, and replace an earlier one as a whole.

metrics.json is written last; of reports of another kind, another file. While files are exchanged, a
stub with "complete": false stands in its place, so that a killed run leaves no folder that looks
like a complete report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vitlib.errors import SourceError, VitlibError
from vitlib.source.locate import read_json
from vitlib.system.atomic import replace_files, staging_folder

METRICS, PREDICTIONS, PAGE = "metrics.json", "predictions.csv", "report.html"
TABLE, MATRIX, CALIBRATION = "accuracy_table.json", "confusion_matrix.json", "calibration.json"
PICTURES = (
    "confusion.png", "precision_recall.png", "roc.png", "reliability.png", "mistakes.png",
    "predicted.png", "errors.png",
)  # fmt: skip
REPORT_FILES = (PREDICTIONS, PAGE, TABLE, MATRIX, CALIBRATION, *PICTURES)
_STAGING = ".vitlib-report-"  # prefix of the folder that new files are written to


class ReportKind(NamedTuple):
    """Kind of a report: its files, and the one that completes it.

    Attributes:
        format: value of "format" in that file.
        version: value of "format_version" in it.
        last: name of the file.
        files: names of the others, which a new report deletes where it lacks them.
        verb: verb of the command line that writes it, for messages.
    """

    format: str
    version: int
    last: str
    files: tuple[str, ...]
    verb: str

    @property
    def stub(self) -> dict[str, Any]:
        """The content of the file while the report is not complete."""
        return {"format": self.format, "format_version": self.version, "complete": False}


EVALUATION = ReportKind("vitlib-evaluation", 1, METRICS, REPORT_FILES, "evaluate")


def check_folder(out: Path, kind: ReportKind = EVALUATION) -> None:
    """Check that a report can be written to `out`.

    Args:
        out: folder of the report.
        kind: kind of the report.

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
    if names and not is_report(out, kind):
        raise SourceError(
            f"{out} holds {', '.join(sorted(names)[:3])}{', …' * (len(names) > 3)} and is no "
            f"report of vitlib {kind.verb}: name a new or an empty folder"
        )


def is_report(folder: Path, kind: ReportKind = EVALUATION) -> bool:
    """Return True if a folder holds a report, complete or not.

    Args:
        folder: the folder to read.
        kind: kind of the report.

    Returns:
        True if the file that completes such a report says that it belongs to one.
    """
    path = folder / kind.last
    try:
        return path.is_file() and read_json(path).get("format") == kind.format
    except VitlibError:
        return False


@contextmanager
def report_folder(out: Path, kind: ReportKind = EVALUATION) -> Iterator[Path]:
    """Yield a staging folder whose files replace those of the report in `out` at the end.

    Files of an earlier report that the new one lacks are deleted. Other files of `out` stay.

    Args:
        out: folder of the report, made where it is absent.
        kind: kind of the report.

    Yields:
        The staging folder, within `out`.

    Raises:
        SourceError: where `out` cannot be written.
    """
    check_folder(out, kind)
    with staging_folder(out, _STAGING) as staging:
        yield staging
        stale = [name for name in kind.files if not (staging / name).exists()]
        stub = json.dumps(kind.stub, indent=2).encode()
        replace_files(staging, out, last=kind.last, stale=stale, stub=stub)


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
