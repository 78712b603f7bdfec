"""HTML page of an audit, made of the parts of evaluate/page.py: all text is escaped there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vitlib.audit.report import AuditReport
from vitlib.errors import count_noun
from vitlib.evaluate.page import (
    Cell,
    encode_data,
    escape_text,
    format_fixed,
    number_cell,
    render_document,
    render_notes,
    render_section,
    render_table,
)

MAX_ROWS = 200  # of a list; its CSV has all of them


class TileLike(Protocol):
    """Photo of a list with the text below it."""

    @property
    def filename(self) -> str:
        """The photo."""

    @property
    def lines(self) -> tuple[str, ...]:
        """Text below it."""


# Title of each list, what it is and its columns.
SECTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "leakage": (
        "In two splits",
        "Photos that train and test share: a test on them flatters.",
        ("filename", "other", "other_split", "kind", "difference", "cosine", "reason"),
    ),
    "duplicates": (
        "Duplicates",
        "Groups of the same photo. The first of each group is the one to keep.",
        ("filename", "group", "kind", "label", "split", "difference", "cosine", "reason"),
    ),
    "label_suspects": (
        "Doubtful labels",
        "Labels that photos of other folds and the nearest photos contradict, the worst first. The "
        "number above counts those that are confident.",
        (
            "filename", "label", "suggested", "probability", "suggested_probability",
            "neighbour_share", "margin", "confident",
        ),
    ),
    "outliers": (
        "Unlike the rest",
        "Photos far from their neighbours: another subject, a rare view, or a damaged photo.",
        ("filename", "label", "scope", "score", "distance", "reason"),
    ),
    "quality": (
        "Quality",
        "Photos that cannot be read, are blank, tiny, long, of rare colours or not upright.",
        ("filename", "split", "issue", "reason"),
    ),
    "label_next": (
        "To label next",
        "Few photos that stand for the set.",
        ("filename", "label", "value", "reason"),
    ),
}  # fmt: skip
CARDS = {
    "leaked": "in two splits",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "conflicting_groups": "groups with two labels",
    "label_suspects": "doubtful labels",
    "outliers": "unlike the rest",
    "quality": "of odd quality",
    "unreadable": "unreadable",
}


def render_audit(
    report: AuditReport,
    sheets: Mapping[str, Sequence[TileLike]],
    thumbnails: Mapping[str, bytes | None],
) -> str:
    """Render the page, with every picture inside it.

    Args:
        report: the report.
        sheets: photos to show of each list, by its name.
        thumbnails: JPEG by filename; None for a photo that cannot be read.

    Returns:
        The HTML.
    """
    data = report.about["data"]
    title = f"Audit of {data['source']}"
    folder = _common_folder(report)
    parts = [f"<h1>{escape_text(title)}</h1>", _cards(report), render_notes(report.notes)]
    for name, (heading, text, columns) in SECTIONS.items():
        rows = getattr(report, name)
        if not rows:
            continue
        body = f'<p class="quiet">{escape_text(text)}</p>'
        body += _tiles(sheets.get(name, ()), thumbnails, folder)
        body += _details(name, rows, columns, folder)
        parts.append(render_section(f"{heading} ({len(rows)})", body))
    parts.append(render_section("Classes", _classes(report)) if report.classes else "")
    parts.append(render_section("Thresholds", _texts("Thresholds", "decides", report.thresholds)))
    parts.append(
        render_section("Settings", _texts("Settings", "setting", dict(_flatten(report.about))))
    )
    return render_document(title, parts)


def _cards(report: AuditReport) -> str:
    """Render the number of photos and of each finding as cards."""
    data = report.about["data"]
    summary = f"{count_noun(data['photos'], 'photo')}, {count_noun(data['classes'], 'class')}"
    if len(data["parts"]) > 1:
        summary += ": " + ", ".join(f"{n} in {name}" for name, n in data["parts"].items())
    cards = [
        f'<div class="card"><b>{report.counts[key]}</b><span>{escape_text(text)}</span></div>'
        for key, text in CARDS.items()
    ]
    return f'<p class="quiet">{escape_text(summary)}</p>\n<div class="cards">{"".join(cards)}</div>'


def _tiles(tiles: Sequence[TileLike], thumbnails: Mapping[str, bytes | None], folder: str) -> str:
    """Render photos with their names and lines."""
    figures = []
    for tile in tiles:
        picture, name = thumbnails.get(tile.filename), _short(tile.filename, folder)
        image = (
            '<div class="gone">cannot be read</div>'
            if picture is None
            else f'<img alt="photo {escape_text(name)}" src="{encode_data(picture, "jpeg")}">'
        )
        lines = "".join(f"<span>{escape_text(line)}</span>" for line in tile.lines if line.strip())
        caption = f"<figcaption><b>{escape_text(name)}</b>{lines}</figcaption>"
        figures.append(f"<figure>{image}{caption}</figure>")
    return f'<div class="tiles">{"".join(figures)}</div>' if figures else ""


def _details(name: str, rows: Sequence[Any], columns: Sequence[str], folder: str) -> str:
    """Render a list as a table; the CSV has more rows than fit a page."""
    body = [
        [_cell(getattr(row, column), column, folder) for column in columns]
        for row in rows[:MAX_ROWS]
    ]
    more = len(rows) - MAX_ROWS
    rest = f"<p>and {more} more, in {name}.csv</p>" if more > 0 else ""
    heads = [column.replace("_", " ") for column in columns]
    return f'<p></p><div class="rows">{render_table(SECTIONS[name][0], heads, body)}</div>{rest}'


def _cell(value: Any, column: str, folder: str) -> Cell:
    """Make a cell of a value."""
    if isinstance(value, bool):
        return ("yes", "1") if value else ("", "")
    if isinstance(value, float):
        return number_cell(value, lambda number: format_fixed(number, 3))
    text = _short(value, folder) if column in ("filename", "other") else str(value)
    return text, text


def _classes(report: AuditReport) -> str:
    """Render a row for each class."""
    heads = ["class", "photos", "threshold", "confident suspects"]
    rows = [
        [
            (str(row["label"]), str(row["label"])),
            *(number_cell(row[key], lambda n: f"{n:g}") for key in list(row)[1:]),
        ]
        for row in report.classes
    ]
    return render_table("Classes", heads, rows, sortable=True)


def _texts(title: str, head: str, values: Mapping[str, object]) -> str:
    """Render names and texts as a table."""
    rows = [[(name, name), (str(value), str(value))] for name, value in values.items()]
    return f'<div class="texts">{render_table(title, [head, "value"], rows)}</div>'


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """List (name, text) of nested settings."""
    pairs: list[tuple[str, object]] = []
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            pairs += _flatten(inner, f"{prefix}{name} ")
        else:
            pairs.append((prefix + name, inner))
    return pairs


def _common_folder(report: AuditReport) -> str:
    """Find the folder of all photos that are named; "" without one."""
    names = [row.filename for name in SECTIONS for row in getattr(report, name)]
    names += [row.other for row in report.leakage]
    try:
        return os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""  # noqa: PTH120
    except ValueError:
        return ""


def _short(filename: str, folder: str) -> str:
    """Return the path of a photo from the folder of all photos."""
    return os.path.relpath(filename, folder) if folder and os.path.isabs(filename) else filename  # noqa: PTH117
