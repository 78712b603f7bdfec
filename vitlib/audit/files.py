"""Files of an audit: lists, contact sheets, the page, and what a later audit reads again."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from vitlib import plots
from vitlib.audit.inspection import Inspection, inspect_photos
from vitlib.audit.page import render_audit
from vitlib.audit.report import (
    FORMAT,
    LISTS,
    VERSION,
    AuditReport,
    DuplicateRow,
    LeakRow,
    NextRow,
    OutlierRow,
    QualityRow,
    SuspectRow,
)
from vitlib.evaluate.folder import PAGE, ReportKind, report_folder, write_json
from vitlib.evaluate.mistakes import SHEET_DPI, encode_thumbnail
from vitlib.image.processor import ImageProcessor
from vitlib.plots import contact_sheet
from vitlib.system.atomic import open_atomic

NUMBERS, FACTS_FILE, FEATURES = "audit.json", "facts.npy", "features"
ROWS = dict(
    zip(LISTS, (DuplicateRow, LeakRow, SuspectRow, OutlierRow, QualityRow, NextRow), strict=True)
)
AUDIT = ReportKind(
    FORMAT,
    VERSION,
    NUMBERS,
    (PAGE, *(f"{name}.csv" for name in LISTS), *(f"{name}.png" for name in LISTS)),
    "audit",
)
SHEET = 24  # photos of a contact sheet


class Tile(NamedTuple):
    """Photo of a contact sheet.

    Attributes:
        filename: the photo.
        lines: text below it.
    """

    filename: str
    lines: tuple[str, ...]


def begin_report(out: Path) -> None:
    """Mark a folder as that of an audit, so that the same command may go on in it after a kill.

    Args:
        out: the folder, checked by check_folder().

    Raises:
        SourceError: it cannot be written.
    """
    if not (out / NUMBERS).exists():
        with open_atomic(out / NUMBERS) as file:
            file.write(json.dumps(AUDIT.stub, indent=2).encode())


@contextmanager
def inspect_and_store(
    photos: Sequence[Path], digests: Sequence[str], out: Path, progress: bool
) -> Iterator[Inspection]:
    """Inspect photos; their facts replace those of an earlier audit in the end.

    Args:
        photos: files.
        digests: of their bytes.
        out: folder of the audit.
        progress: show a progress bar on stderr.

    Yields:
        The facts.
    """
    temporary = out / f".{FACTS_FILE}.{os.getpid()}.part"
    try:
        earlier = out / FACTS_FILE
        yield inspect_photos(photos, digests, temporary, earlier=earlier, progress=progress)
        temporary.replace(earlier)
    finally:
        temporary.unlink(missing_ok=True)


def write_report(report: AuditReport, processor: ImageProcessor | None = None) -> None:
    """Write every file of a report into report.folder, which changes once all are written.

    Args:
        report: the report.
        processor: preprocessing that says how images deeper than 8 bits are shown.

    Raises:
        SourceError: the folder cannot be written.
    """
    with report_folder(report.folder, AUDIT) as staging:
        for name in LISTS:
            write_rows(staging / f"{name}.csv", getattr(report, name), ROWS[name])
        thumbnails: dict[str, bytes | None] = {}
        sheets = {name: select_tiles(report, name) for name in LISTS}
        for name, tiles in sheets.items():
            if tiles:
                _draw(tiles, staging / f"{name}.png", processor)
            for tile in tiles:
                if tile.filename not in thumbnails:
                    thumbnails[tile.filename] = encode_thumbnail(Path(tile.filename), processor)
        page = render_audit(report, sheets, thumbnails)
        (staging / PAGE).write_text(page, encoding="utf-8", errors="backslashreplace")
        write_json(staging / NUMBERS, report.as_dict())


def write_rows(path: Path, rows: Sequence[Any], kind: type[Any]) -> None:
    """Write rows as a CSV, with a header also where there are none.

    Args:
        path: the file.
        rows: dataclasses of one kind.
        kind: their class.
    """
    header = [field.name for field in fields(kind)]
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def select_tiles(report: AuditReport, name: str) -> list[Tile]:
    """Select the photos of a list that a contact sheet shows, the most urgent first.

    Args:
        report: the report.
        name: of LISTS.

    Returns:
        At most 24 photos; duplicates and leaked photos beside what they equal.
    """
    rows = getattr(report, name)[:SHEET]
    if name == "leakage":
        return [
            tile
            for row in rows[: SHEET // 2]
            for tile in (
                Tile(row.filename, (f"{row.split} {row.label}", row.kind)),
                Tile(row.other, (f"{row.other_split} {row.other_label}", f"{row.difference:.3f}")),
            )
        ]
    tiles = []
    for row in rows:
        if isinstance(row, DuplicateRow):
            lines = (f"group {row.group}: {row.kind}", f"{row.split} {row.label}")
        elif isinstance(row, SuspectRow):
            lines = (
                f"{row.probability:.2f} {row.label}",
                f"{row.suggested_probability:.2f} {row.suggested}",
            )
        elif isinstance(row, OutlierRow):
            lines = (f"score {row.score:.1f} in its {row.scope}", row.label)
        elif isinstance(row, QualityRow):
            lines = (row.issue, row.split)
        else:
            lines = (f"{row.rank}", row.label)
        tiles.append(Tile(row.filename, lines))
    return tiles


def _draw(tiles: Sequence[Tile], path: Path, processor: ImageProcessor | None) -> None:
    """Draw a contact sheet; a photo that cannot be read gets a tile that says so."""
    figure = contact_sheet(
        [Path(tile.filename) for tile in tiles],
        ["\n".join(tile.lines) for tile in tiles],
        processor=processor,
        errors={},
        names=[Path(tile.filename).name for tile in tiles],
    )
    figure.set_dpi(SHEET_DPI)
    plots.save(figure, path)
