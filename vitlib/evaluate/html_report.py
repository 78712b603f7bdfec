"""HTML page of a report, made of the parts in page.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from vitlib.errors import count_noun
from vitlib.evaluate.mistakes import Mistake
from vitlib.evaluate.page import (
    DASH,
    encode_data,
    escape_text,
    format_fixed,
    format_significant,
    number_cell,
    render_document,
    render_notes,
    render_picture,
    render_section,
    render_table,
)
from vitlib.evaluate.report import Report

Photo = tuple[Mistake, bytes | None]
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
    parts = [
        f"<h1>{escape_text(title)}</h1>",
        _cards(report),
        render_notes(report.notes),
        render_section("Metrics", _metrics_table(report)),
        *_chart_sections(report, charts, mistakes),
        render_section("Each output", _outputs_table(report))
        if report.per_output
        else render_section("Each class", _classes_table(report)),
        _failed_section(report),
        render_section("Settings", _settings_table(report)),
    ]
    return render_document(title, parts)


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


def _metrics_table(report: Report) -> str:
    """Render every metric with its interval."""
    before = report.uncalibrated
    head = ["metric", "value", "95 % interval", *["before calibration"] * bool(before)]
    rows = []
    for name, value in report.metrics.items():
        ends = report.intervals.get(name)
        form = format_significant if report.per_output else format_fixed
        span = f"{form(ends[0])} to {form(ends[1])}" if ends else ""
        row = [(name, name), number_cell(value, form), (span, span)]
        rows.append([*row, number_cell(before[name]) if name in before else ("", "")][: len(head)])
    boot = report.about["bootstrap"]
    shares = "" if report.per_output else "Wilson for the accuracy and other shares, else "
    method = (
        f'<p class="quiet">Intervals: {shares}the percentile bootstrap, {boot["resamples"]} '
        "resamples of the photos. They show how the choice of photos changes a metric, not how "
        "another training run would.</p>"
    )
    return render_table("Metrics", head, rows) + (method if boot["resamples"] else "")


def _outputs_table(report: Report) -> str:
    """Render a row for each output of a regression."""
    head = ["output", "MAE", "RMSE", "R2", "mean", "std", "minimum", "maximum"]
    rows = [
        [(row.label, row.label), *(number_cell(value, format_significant) for value in row[1:])]
        for row in report.per_output
    ]
    return render_table("Each output", head, rows, sortable=True)


def _classes_table(report: Report) -> str:
    """Render a row for each class."""
    head = ["class", "photos", "predicted", "precision", "recall", "F1", "AUC", "average precision"]
    rows = []
    for index, row in enumerate(report.per_class):
        counts = [(f"{n}", f"{n}") for n in (row.support, row.predicted)]
        scores = (row.precision, row.recall, row.f1_score, row.AUC, row.average_precision_score)
        cells = [(row.label, row.label), *counts, *map(number_cell, scores)]
        if report.thresholds:
            cells.append(number_cell(report.thresholds[index]))
        rows.append(cells)
    head += ["threshold"] * bool(report.thresholds)
    return render_table("Each class", head, rows, sortable=True)


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
        render_section(
            title,
            render_picture(_describe_chart(report, name), versions)
            if versions
            else _mistake_tiles(mistakes),
        )
        for name, title in titles.items()
        if (versions := charts.get(name, {})) or name == "mistakes.png"
    ]


def _describe_chart(report: Report, name: str) -> str:
    """Say in text what a chart shows, and where its numbers are."""
    of_classes = count_noun(len(report.per_class), "class")
    in_table = "are in the table Each class"
    if name == "confusion.png" and report.multi_label:
        return f"Right, missed and wrong labels of {of_classes}; recall and precision {in_table}."
    if name == "confusion.png":
        pairs = [f"{a} taken for {b} {n}x" for a, b, n in report.confused[:5]]
        mistakes = f"most frequent mistakes: {'; '.join(pairs)}" if pairs else "no mistakes"
        return f"Confusion of {of_classes}; {mistakes}."
    if name == "reliability.png":
        error = format_fixed(report.metrics["expected_calibration_error"], 3)
        return f"Accuracy over confidence; expected calibration error {error}."
    if name == "roc.png":
        return f"True over false positive rates of {of_classes}; areas {in_table}, column AUC."
    if name == "precision_recall.png":
        return f"Precision over recall of {of_classes}; average precision {in_table}."
    shown = "Predicted over true numbers" if name == "predicted.png" else "Histogram of the errors"
    return f"{shown} of each output; errors and R2 are in the table Each output."


def _mistake_tiles(mistakes: Sequence[Photo]) -> str:
    """Render each mistake as its photo, the name of its file and its labels."""
    if not mistakes:
        return "<p>None: every prediction is correct.</p>"
    tiles = []
    for mistake, photo in mistakes:
        image = '<div class="gone">no longer readable</div>'
        if photo is not None:
            image = (
                f'<img alt="photo {escape_text(mistake.name)}" src="{encode_data(photo, "jpeg")}">'
            )
        lines = "".join(f"<span>{escape_text(line)}</span>" for line in mistake.lines)
        tiles.append(
            f"<figure>{image}<figcaption><b>{escape_text(mistake.name)}</b>{lines}</figcaption>"
            "</figure>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _failed_section(report: Report) -> str:
    """List the photos that could not be used; empty without any."""
    both = [*report.failed, *report.failed_tuning]
    if not both:
        return ""
    rows = [[(file, file), (error, error)] for file, error in both[:MAX_ROWS]]
    more = len(both) - MAX_ROWS
    rest = f"<p>and {more} more, in metrics.json</p>" if more > 0 else ""
    title = f"{count_noun(len(both), 'photo')} could not be used"
    body = render_table(title, ["file", "error"], rows) + rest
    return render_section(title, f'<div class="texts">{body}</div>')


def _settings_table(report: Report) -> str:
    """Render model, data, versions and calibration as a table."""
    rows = []
    for name, value in _flatten(report.about):
        rows.append([(name, name), (value, value)])
    if report.calibration is not None:
        fitted = report.calibration
        origin = f"tuned on {fitted.photos} photos of {fitted.source}"
        rows.append([("temperature", ""), (f"{fitted.temperature:.4g}, {origin}", "")])
    return f'<div class="texts">{render_table("Settings", ["setting", "value"], rows)}</div>'


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield (name, text) of nested settings; names of inner ones follow those of outer ones."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{name} ")
        elif isinstance(inner, list | tuple):
            yield prefix + name, ", ".join(map(str, inner[:20])) + ", …" * (len(inner) > 20)
        else:
            yield prefix + name, DASH if inner is None else str(inner)
