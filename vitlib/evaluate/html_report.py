"""report.html: the whole report in one file, which asks no network for anything.

Labels and file names are hostile: all text is escaped, and the policy in the page's head lets run
no script but the one of page_parts.py.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from vitlib.evaluate.html_parts import NAMES, SCRIPT, STYLE
from vitlib.evaluate.report import Report

Cell = tuple[str, str]  # what is shown, and what it is sorted by
DASH = "\N{EN DASH}"
MOST_ROWS = 500  # of a list of photos; all are in predictions.csv


def page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """pictures: file name -> PNG, of those there are. All is in the page, none beside it."""
    about = report.about
    title = f"{about['model']['name'] or 'a model'} on {about['data']['source']}"
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    parts = [
        f"<h1>{text(title)}</h1>",
        _head(report),
        _warnings(report),
        _section("Metrics", _metrics(report)),
        *_pictures(report, pictures),
        _section("Each output", _outputs(report))
        if report.per_output
        else _section("Each class", _classes(report)),
        _failed(report),
        _section("How it was measured", _about(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Escaped; what is no character, or turns the reading order, becomes its escape."""
    clean = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
    return escape(clean, quote=True)


def number(value: float, digits: int = 4) -> str:
    """With its digits; a dash where undefined."""
    return f"{value:.{digits}f}" if math.isfinite(value) else DASH


def quantity(value: float) -> str:
    """A number of any size, with five digits; a dash where undefined."""
    return f"{value:.5g}" if math.isfinite(value) else DASH


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, sortable: bool = False) -> str:
    """The first column is text, the others are numbers."""
    names = [
        f'<th scope="col"><button type="button">{text(name)}</button></th>'
        if sortable
        else f'<th scope="col">{text(name)}</th>'
        for name in head
    ]
    lines = [f"<tr>{''.join(map(_td, row))}</tr>" for row in rows]
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="wide" tabindex="0"><table{kind}><thead><tr>{"".join(names)}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


def _td(cell: Cell) -> str:
    shown, by = cell
    key = f' data-v="{text(by)}"' if by != shown else ""
    breakable = text(shown).replace("_", "_<wbr>")
    return f"<td{key}>{breakable}</td>"


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{body}\n</section>"


def _head(report: Report) -> str:
    """The number to look at first, and how many photos it is of."""
    first, data = report.primary, report.about["data"]
    cards = [_card(report, first)]
    others = ("f1_score_macro", "accuracy" if first != "accuracy" else "top_5_accuracy")
    for name in ("mean_absolute_error", "r2_score") if report.per_output else others:
        if name in report.metrics:
            cards.append(_card(report, name))
    what = f"{len(report.per_class)} classes"
    what = f"{len(report.per_output)} outputs" if report.per_output else what
    counted = f"{data['photos']} photos, {what}"
    cards.append(f'<div class="card"><b>{data["evaluated"]}</b><span>photos measured</span></div>')
    return f'<p class="quiet">{text(counted)}</p>\n<div class="cards">{"".join(cards)}</div>'


def _card(report: Report, name: str) -> str:
    ends = report.intervals.get(name)
    form = quantity if report.per_output else partial(number, digits=3)
    span = f"<i>{form(ends[0])} to {form(ends[1])}</i>" if ends else ""
    value = form(report.metrics[name])
    return f'<div class="card"><b>{value}</b><span>{text(_said(name))}</span>{span}</div>'


def _said(name: str) -> str:
    return NAMES.get(name, name)


def _warnings(report: Report) -> str:
    notes = list(report.notes)
    if not notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{text(note)}</li>" for note in notes)}</ul>'


def _metrics(report: Report) -> str:
    before = report.uncalibrated
    head = ["metric", "value", "95 % interval", *["before calibration"] * bool(before)]
    rows = []
    for name, value in report.metrics.items():
        ends = report.intervals.get(name)
        form = quantity if report.per_output else number
        span = f"{form(ends[0])} to {form(ends[1])}" if ends else ""
        row = [(name, name), _cell(value, form), (span, span)]
        rows.append([*row, _cell(before[name]) if name in before else ("", "")][: len(head)])
    boot = report.about["bootstrap"]
    said = (
        f'<p class="quiet">Intervals: the percentile bootstrap, {boot["resamples"]} draws of as '
        "many photos. They say what the choice of photos may do, not what another training would."
        "</p>"
    )
    return table(head, rows) + (said if boot["resamples"] else "")


def _cell(value: float, form: Callable[[float], str] = number) -> Cell:
    return form(value), f"{value:.9g}" if math.isfinite(value) else ""


def _outputs(report: Report) -> str:
    head = ["output", "MAE", "RMSE", "R2", "mean", "std", "least", "greatest"]
    rows = [
        [(row.label, row.label), *(_cell(value, quantity) for value in row[1:])]
        for row in report.per_output
    ]
    return table(head, rows, sortable=True)


def _classes(report: Report) -> str:
    several = bool(report.thresholds)
    head = ["class", "photos", "said", "precision", "recall", "F1", "AUC", "average precision"]
    rows = []
    for index, row in enumerate(report.per_class):
        counts = [(f"{n}", f"{n}") for n in (row.support, row.predicted)]
        measured = (row.precision, row.recall, row.f1_score, row.AUC, row.average_precision_score)
        cells = [(row.label, row.label), *counts, *map(_cell, measured)]
        rows.append([*cells, *[_cell(report.thresholds[index])] * several] if several else cells)
    return table([*head, *["threshold"] * several], rows, sortable=True)


def _pictures(report: Report, pictures: Mapping[str, bytes]) -> list[str]:
    named = {
        "predicted.png": "Predicted and true",
        "errors.png": "Errors",
        "confusion.png": "Found and missed" if report.multi_label else "Confusion",
        "mistakes.png": "The worst mistakes",
        "precision_recall.png": "Precision and recall",
        "roc.png": "ROC",
        "reliability.png": "Reliability",
    }
    large_ones = {"mistakes.png", *["confusion.png"] * (len(report.per_class) > 8)}
    found = []
    for name, title in named.items():
        if name in pictures:
            data = base64.b64encode(pictures[name]).decode()
            # Of those with small print: a phone scrolls sideways rather than shrink it.
            large = ' class="large"' if name in large_ones else ""
            image = f'<img{large} alt="{title}" src="data:image/png;base64,{data}">'
            found.append(_section(title, f'<div class="picture" tabindex="0">{image}</div>'))
    if "mistakes.png" not in pictures:
        found.append(
            _section("The worst mistakes", "<p>There are none: every answer is right.</p>")
        )
    return found


def _failed(report: Report) -> str:
    both = [*report.failed, *report.failed_tuning]
    if not both:
        return ""
    rows = [[(file, file), (why, why)] for file, why in both[:MOST_ROWS]]
    more = len(both) - MOST_ROWS
    rest = f"<p>and {more} more, in metrics.json</p>" if more > 0 else ""
    body = table(["file", "why"], rows) + rest
    return _section(f"{len(both)} photos could not be used", f'<div class="texts">{body}</div>')


def _about(report: Report) -> str:
    rows = []
    for name, value in _flat(report.about):
        rows.append([(name, name), (value, value)])
    if report.calibration is not None:
        held = report.calibration
        told = f"tuned on {held.photos} photos of {held.source}"
        rows.append([("temperature", ""), (f"{held.temperature:.4g}, {told}", "")])
    return f'<div class="texts">{table(["what", "value"], rows)}</div>'


def _flat(value: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{before}{name} ")
        elif isinstance(inner, list | tuple):
            yield before + name, ", ".join(map(str, inner[:20])) + ", …" * (len(inner) > 20)
        else:
            yield before + name, DASH if inner is None else str(inner)
