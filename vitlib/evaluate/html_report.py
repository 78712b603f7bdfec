"""HTML page of a report: everything in one file, which fetches nothing from a network.

Labels and file names are hostile input: all text is escaped, and the content security policy in the
head of the page allows a single script, SCRIPT, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from vitlib.errors import count_noun
from vitlib.evaluate.mistakes import Mistake
from vitlib.evaluate.page_style import SCRIPT, STYLE
from vitlib.evaluate.report import Report

Cell = tuple[str, str]  # text, and the key that sorts it
Photo = tuple[Mistake, bytes | None]
DASH = "\N{EN DASH}"
MAX_ROWS = 500  # of a list of photos; predictions.csv has all of them

TITLES = {  # of the metrics on the cards; others are shown by their names
    "accuracy": "accuracy",
    "top_5_accuracy": "top-5 accuracy",
    "f1_score_macro": "macro F1",
    "root_mean_squared_error": "root mean squared error",
    "mean_absolute_error": "mean absolute error",
    "r2_score": "R2",
    "iou": "IoU, mean over photos",
}


def render_page(
    report: Report, charts: Mapping[str, Mapping[str, bytes]], mistakes: Sequence[Photo]
) -> str:
    """Render the page, with every picture inside it.

    Args:
        report: the report.
        charts: PNG of each chart, by its file name and then by its version: light, dark, and for
            narrow pages "narrow light" and "narrow dark".
        mistakes: the worst mistakes, each with the JPEG of its photo, or None.

    Returns:
        The HTML.
    """
    about = report.about
    title = f"{about['model']['name'] or 'a model'} on {about['data']['source']}"
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    parts = [
        f"<h1>{escape_text(title)}</h1>",
        _cards(report),
        _notes_list(report),
        _section("Metrics", _metrics_table(report)),
        *_chart_sections(report, charts, mistakes),
        _section("Each output", _outputs_table(report))
        if report.per_output
        else _section("Each class", _classes_table(report)),
        _failed_section(report),
        _section("Settings", _settings_table(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def escape_text(value: object) -> str:
    """Escape text for HTML.

    Args:
        value: converted to text.

    Returns:
        The text, with unprintable characters and those that turn the reading order as escapes.
    """
    clean = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
    return escape(clean, quote=True)


def format_fixed(value: float, digits: int = 4) -> str:
    """Format a number with fixed decimals.

    Args:
        value: the number.
        digits: decimals.

    Returns:
        The text; a dash for NaN and infinity.
    """
    return f"{value:.{digits}f}" if math.isfinite(value) else DASH


def format_significant(value: float, digits: int = 5) -> str:
    """Format a number of any size.

    Args:
        value: the number.
        digits: significant digits.

    Returns:
        The text; a dash for NaN and infinity.
    """
    return f"{value:.{digits}g}" if math.isfinite(value) else DASH


def render_table(
    head: Sequence[str], rows: Iterable[Sequence[Cell]], *, sortable: bool = False
) -> str:
    """Render a table whose first column is text and whose others are numbers.

    Args:
        head: names of the columns.
        rows: cells of each row.
        sortable: True if a click on a column's name sorts the rows.

    Returns:
        The HTML.
    """
    names = [
        f'<th scope="col"><button type="button">{escape_text(name)}</button></th>'
        if sortable
        else f'<th scope="col">{escape_text(name)}</th>'
        for name in head
    ]
    body = [f"<tr>{''.join(map(_td, row, head))}</tr>" for row in rows]
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="wide" tabindex="0"><table{kind}><thead><tr>{"".join(names)}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )


def _td(cell: Cell, column: str) -> str:
    """Render a cell; long names of metrics may break at underscores."""
    shown, sort_key = cell
    # A narrow page shows the column's name beside the cell.
    key = f' data-v="{escape_text(sort_key)}"' if sort_key != shown else ""
    breakable = escape_text(shown).replace("_", "_<wbr>")
    return f'<td{key} data-column="{escape_text(column)}">{breakable}</td>'


def _section(title: str, body: str) -> str:
    """Render a section of the page."""
    return f"<section>\n<h2>{escape_text(title)}</h2>\n{body}\n</section>"


def _cards(report: Report) -> str:
    """Render the primary metric, two more and the number of photos as cards."""
    first, data = report.primary, report.about["data"]
    cards = [_card(report, first)]
    others = ("f1_score_macro", "accuracy" if first != "accuracy" else "top_5_accuracy")
    for name in ("mean_absolute_error", "r2_score") if report.per_output else others:
        if name in report.metrics:
            cards.append(_card(report, name))
    size = count_noun(len(report.per_class), "class")
    size = count_noun(len(report.per_output), "output") if report.per_output else size
    summary = f"{count_noun(data['photos'], 'photo')}, {size}"
    cards.append(f'<div class="card"><b>{data["evaluated"]}</b><span>photos measured</span></div>')
    return f'<p class="quiet">{escape_text(summary)}</p>\n<div class="cards">{"".join(cards)}</div>'


def _card(report: Report, name: str) -> str:
    """Render a metric and its interval as a card."""
    ends = report.intervals.get(name)
    form = partial(format_significant if report.per_output else format_fixed, digits=3)
    span = f"<i>{form(ends[0])} to {form(ends[1])}</i>" if ends else ""
    value, title = form(report.metrics[name]), escape_text(TITLES.get(name, name))
    return f'<div class="card"><b>{value}</b><span>{title}</span>{span}</div>'


def _notes_list(report: Report) -> str:
    """Render the notes as a list; empty without notes."""
    notes = list(report.notes)
    if not notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escape_text(note)}</li>" for note in notes)}</ul>'


def _metrics_table(report: Report) -> str:
    """Render every metric with its interval."""
    before = report.uncalibrated
    head = ["metric", "value", "95 % interval", *["before calibration"] * bool(before)]
    rows = []
    for name, value in report.metrics.items():
        ends = report.intervals.get(name)
        form = format_significant if report.per_output else format_fixed
        span = f"{form(ends[0])} to {form(ends[1])}" if ends else ""
        row = [(name, name), _cell(value, form), (span, span)]
        rows.append([*row, _cell(before[name]) if name in before else ("", "")][: len(head)])
    boot = report.about["bootstrap"]
    shares = "" if report.per_output else "Wilson for the accuracy and other shares, else "
    method = (
        f'<p class="quiet">Intervals: {shares}the percentile bootstrap, {boot["resamples"]} '
        "resamples of the photos. They show how the choice of photos changes a metric, not how "
        "another training run would.</p>"
    )
    return render_table(head, rows) + (method if boot["resamples"] else "")


def _cell(value: float, form: Callable[[float], str] = format_fixed) -> Cell:
    """Make a cell of a number, sorted by nine significant digits."""
    return form(value), f"{value:.9g}" if math.isfinite(value) else ""


def _outputs_table(report: Report) -> str:
    """Render a row for each output of a regression."""
    head = ["output", "MAE", "RMSE", "R2", "mean", "std", "minimum", "maximum"]
    rows = [
        [(row.label, row.label), *(_cell(value, format_significant) for value in row[1:])]
        for row in report.per_output
    ]
    return render_table(head, rows, sortable=True)


def _classes_table(report: Report) -> str:
    """Render a row for each class."""
    head = ["class", "photos", "predicted", "precision", "recall", "F1", "AUC", "average precision"]
    rows = []
    for index, row in enumerate(report.per_class):
        counts = [(f"{n}", f"{n}") for n in (row.support, row.predicted)]
        scores = (row.precision, row.recall, row.f1_score, row.AUC, row.average_precision_score)
        cells = [(row.label, row.label), *counts, *map(_cell, scores)]
        if report.thresholds:
            cells.append(_cell(report.thresholds[index]))
        rows.append(cells)
    return render_table([*head, *["threshold"] * bool(report.thresholds)], rows, sortable=True)


def _chart_sections(
    report: Report, charts: Mapping[str, Mapping[str, bytes]], mistakes: Sequence[Photo]
) -> list[str]:
    """Render a section for each chart and for the mistakes, in a fixed order."""
    titles = {
        "predicted.png": "Predicted and true",
        "errors.png": "Errors",
        "confusion.png": "Correct and wrong predictions" if report.multi_label else "Confusion",
        "mistakes.png": "The worst mistakes",
        "precision_recall.png": "Precision and recall",
        "roc.png": "ROC",
        "reliability.png": "Reliability",
    }
    return [
        _section(
            title, _mistake_tiles(mistakes) if name not in charts else _picture(title, versions)
        )
        for name, title in titles.items()
        if (versions := charts.get(name, {})) or name == "mistakes.png"
    ]


def _picture(title: str, versions: Mapping[str, bytes]) -> str:
    """Render a chart, whose version follows the page's width and the reader's colour scheme."""
    dark, narrow = "(prefers-color-scheme: dark)", "(max-width: 52rem)"
    conditions = {"narrow dark": f"{narrow} and {dark}", "narrow light": narrow, "dark": dark}
    sources = [
        f'<source media="{condition}" srcset="{_data(versions[name], "png")}">'
        for name, condition in conditions.items()
        if name in versions
    ]
    large = ' class="large"' if "narrow light" in versions else ""
    image = f'<img{large} alt="{title}" src="{_data(versions["light"], "png")}">'
    return f'<div class="picture"><picture>{"".join(sources)}{image}</picture></div>'


def _mistake_tiles(mistakes: Sequence[Photo]) -> str:
    """Render each mistake as its photo, the name of its file and its labels."""
    if not mistakes:
        return "<p>None: every prediction is correct.</p>"
    tiles = []
    for mistake, photo in mistakes:
        image = '<div class="gone">no longer readable</div>'
        if photo is not None:
            image = f'<img alt="" src="{_data(photo, "jpeg")}">'
        lines = "".join(f"<span>{escape_text(line)}</span>" for line in mistake.lines)
        tiles.append(
            f"<figure>{image}<figcaption><b>{escape_text(mistake.name)}</b>{lines}</figcaption>"
            "</figure>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _data(content: bytes, kind: str) -> str:
    """Encode an image as a URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _failed_section(report: Report) -> str:
    """List the photos that could not be used; empty without any."""
    both = [*report.failed, *report.failed_tuning]
    if not both:
        return ""
    rows = [[(file, file), (error, error)] for file, error in both[:MAX_ROWS]]
    more = len(both) - MAX_ROWS
    rest = f"<p>and {more} more, in metrics.json</p>" if more > 0 else ""
    body = render_table(["file", "error"], rows) + rest
    return _section(f"{len(both)} photos could not be used", f'<div class="texts">{body}</div>')


def _settings_table(report: Report) -> str:
    """Render model, data, versions and calibration as a table."""
    rows = []
    for name, value in _flatten(report.about):
        rows.append([(name, name), (value, value)])
    if report.calibration is not None:
        fitted = report.calibration
        origin = f"tuned on {fitted.photos} photos of {fitted.source}"
        rows.append([("temperature", ""), (f"{fitted.temperature:.4g}, {origin}", "")])
    return f'<div class="texts">{render_table(["setting", "value"], rows)}</div>'


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield (name, text) of nested settings; names of inner ones follow those of outer ones."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{name} ")
        elif isinstance(inner, list | tuple):
            yield prefix + name, ", ".join(map(str, inner[:20])) + ", …" * (len(inner) > 20)
        else:
            yield prefix + name, DASH if inner is None else str(inner)
