"""List of photos to leave out, which `vitlib finetune --exclude` reads: nothing is deleted."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from vitlib.audit.judgement import LEAST_ACCURACY
from vitlib.audit.report import AuditReport, DuplicateRow
from vitlib.audit.source import AGAINST
from vitlib.system.atomic import open_atomic

HEADER = ("filename", "label", "reason")
# With so little support by neighbours, regression and neighbours agree that a label is wrong.
NEIGHBOUR_SHARE = 0.3


def select_photos(report: AuditReport) -> list[tuple[str, str, str]]:
    """Select the photos of the audited parts to leave out.

    These are photos that cannot be read or are of one colour, all but one of each group of
    duplicates, copies of one file with different labels (all of them), photos that are also on the
    other side, and labels that regression and neighbours both contradict. Near duplicates with
    different labels, outliers and other findings are for eyes to decide.

    Args:
        report: the report.

    Returns:
        (filename, label, reason), each photo once, by name.
    """
    reasons: dict[str, tuple[str, str]] = {}

    def leave_out(filename: str, label: str, reason: str) -> None:
        reasons.setdefault(filename, (label, reason))

    for quality in report.quality:
        if quality.split != AGAINST and quality.issue in ("unreadable", "blank"):
            leave_out(quality.filename, "", f"{quality.issue}: {quality.reason}")
    for leak in report.leakage:
        leave_out(leak.filename, leak.label, f"also in {leak.other_split}: {leak.other}")
    equal: dict[int, list[DuplicateRow]] = {}
    for row in report.duplicates:
        if row.kind in ("kept", "bytes", "pixels"):
            equal.setdefault(row.group, []).append(row)
    for rows in equal.values():
        labels = sorted({row.label for row in rows if row.label})
        for row in rows if len(labels) > 1 else ():
            if row.split != AGAINST:
                leave_out(row.filename, row.label, f"one photo with labels {', '.join(labels)}")
    for row in report.duplicates:
        if row.split != AGAINST and row.kind != "kept" and not row.conflict:
            leave_out(row.filename, row.label, f"a duplicate of {row.same_as}")
    trusted = report.label_accuracy >= LEAST_ACCURACY
    for suspect in report.label_suspects if trusted else ():
        sure = suspect.confident and suspect.margin < 0
        if sure and suspect.neighbour_share < NEIGHBOUR_SHARE:
            reason = f"probably {suspect.suggested}: {suspect.reason}"
            leave_out(suspect.filename, suspect.label, reason)
    return [(filename, *reasons[filename]) for filename in sorted(reasons)]


def write_fix_list(report: AuditReport, path: Path) -> int:
    """Write the photos to leave out as a CSV with the columns filename, label and reason.

    Args:
        report: the report.
        path: the file.

    Returns:
        The number of photos.

    Raises:
        SourceError: the file cannot be written.
    """
    rows = select_photos(report)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *rows])
    with open_atomic(path) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    return len(rows)
