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

from vitlib.evaluate.report import Report

Cell = tuple[str, str]  # text, and the key that sorts it
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

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c1c1e; --quiet: #5c5c63; --line: #dcdce0;
  --card: #f4f4f6; --mark: #0072b2; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --back: #17181a; --ink: #ececee; --quiet: #a4a4ab;
  --line: #37383c; --card: #232427; --mark: #6cb8ea; --warn: #3b3114; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
.quiet { color: var(--quiet); font-size: .9rem; margin: .5rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.card { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; display: flex;
  flex-direction: column; }
.card b { font-size: 1.7rem; font-variant-numeric: tabular-nums; line-height: 1.2; }
.card span { font-size: .9rem; }
.card i { font-style: normal; font-size: .85rem; color: var(--quiet); }
.notes { background: var(--warn); border-radius: .6rem; padding: .75rem 1rem .75rem 2rem;
  font-size: .92rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; }
.wide:has(.sortable) { max-height: 40rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere;
  min-width: 8rem; }
.texts th, .texts td { text-align: left; white-space: normal; overflow-wrap: anywhere;
  vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--card); font-weight: 600; }
tbody tr + tr td { border-top: 1px solid var(--line); }
th button { all: unset; cursor: pointer; font: inherit; }
th button:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
th[aria-sort] button { color: var(--mark); }
th[aria-sort="ascending"] button::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort="descending"] button::after { content: " \\25BC"; font-size: .7em; }
.picture { background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: .5rem;
  overflow-x: auto; }
.picture img { display: block; max-width: min(100%, 38rem); height: auto; margin: 0 auto; }
.picture img.large { max-width: max(100%, 36rem); }
@media (max-width: 30rem) { main { padding: .75rem .75rem 3rem; } h1 { font-size: 1.25rem; }
  th, td { padding: .35rem .5rem; } }
@media print { .wide { max-height: none; overflow: visible; } }
"""

# Sorts a table by a column; undefined numbers come last in both directions.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" ||
      (column > 0 && head.getAttribute("aria-sort") !== "descending");
    const keyed = [...body.rows].map(row => {
      const cell = row.cells[column];
      const value = cell.dataset.v === undefined ? cell.textContent : cell.dataset.v;
      return [column ? (value === "" ? NaN : Number(value)) : value, row];
    });
    keyed.sort(([a], [b]) => {
      if (column === 0) return (down ? -1 : 1) * a.localeCompare(b);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return down ? b - a : a - b;
    });
    body.append(...keyed.map(([, row]) => row));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }));
}
"""


def render_page(report: Report, figures: Mapping[str, bytes]) -> str:
    """Render the page, with every figure inside it.

    Args:
        report: the report.
        figures: PNG of each figure, by its file name.

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
        *_figure_sections(report, figures),
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


def format_significant(value: float) -> str:
    """Format a number of any size with five significant digits.

    Args:
        value: the number.

    Returns:
        The text; a dash for NaN and infinity.
    """
    return f"{value:.5g}" if math.isfinite(value) else DASH


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
    body = [f"<tr>{''.join(map(_td, row))}</tr>" for row in rows]
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="wide" tabindex="0"><table{kind}><thead><tr>{"".join(names)}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )


def _td(cell: Cell) -> str:
    """Render a cell; long names of metrics may break at underscores."""
    shown, sort_key = cell
    key = f' data-v="{escape_text(sort_key)}"' if sort_key != shown else ""
    breakable = escape_text(shown).replace("_", "_<wbr>")
    return f"<td{key}>{breakable}</td>"


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
    size = f"{len(report.per_class)} classes"
    size = f"{len(report.per_output)} outputs" if report.per_output else size
    summary = f"{data['photos']} photos, {size}"
    cards.append(f'<div class="card"><b>{data["evaluated"]}</b><span>photos measured</span></div>')
    return f'<p class="quiet">{escape_text(summary)}</p>\n<div class="cards">{"".join(cards)}</div>'


def _card(report: Report, name: str) -> str:
    """Render a metric and its interval as a card."""
    ends = report.intervals.get(name)
    form = format_significant if report.per_output else partial(format_fixed, digits=3)
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
    method = (
        '<p class="quiet">Intervals: Wilson for the accuracy and other shares of the photos, else '
        f"the percentile bootstrap, {boot['resamples']} resamples of the photos. They show how the "
        "choice of photos changes a metric, not how another training run would.</p>"
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


def _figure_sections(report: Report, figures: Mapping[str, bytes]) -> list[str]:
    """Render a section for each figure, in a fixed order."""
    titles = {
        "predicted.png": "Predicted and true",
        "errors.png": "Errors",
        "confusion.png": "Correct and wrong predictions" if report.multi_label else "Confusion",
        "mistakes.png": "The worst mistakes",
        "precision_recall.png": "Precision and recall",
        "roc.png": "ROC",
        "reliability.png": "Reliability",
    }
    large_figures = {"mistakes.png", *["confusion.png"] * (len(report.per_class) > 8)}
    sections = []
    for name, title in titles.items():
        if name in figures:
            data = base64.b64encode(figures[name]).decode()
            # A phone scrolls figures with small print sideways instead of shrinking them.
            large = ' class="large"' if name in large_figures else ""
            image = f'<img{large} alt="{title}" src="data:image/png;base64,{data}">'
            sections.append(_section(title, f'<div class="picture" tabindex="0">{image}</div>'))
    if "mistakes.png" not in figures:
        sections.append(_section("The worst mistakes", "<p>None: every prediction is correct.</p>"))
    return sections


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
