"""Page of a probe's report: the answer first, then charts, tables and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vitlib.errors import count_noun
from vitlib.evaluate.html_report import TITLES
from vitlib.evaluate.page import (
    DASH,
    Cell,
    escape_text,
    number_cell,
    render_document,
    render_notes,
    render_picture,
    render_section,
    render_table,
)
from vitlib.probe.figures import METHOD_NAMES, best_feature, short_name
from vitlib.probe.results import FewShotRow, ProbeReport, ProbeRow, SelectedRow

MAX_ROWS = 500  # of a table on the page; probe.csv has all
TABLE, FEW = "Model, layer, pool and method", "Few photos of a class"
CHARTS = {  # title, and the text in place of the picture
    "layers.png": (
        "By layer",
        f"The metric by layer, pool and method; its numbers are in the table {TABLE}.",
    ),
    "few_shot.png": (
        "By number of photos",
        f"The metric by number of photos of a class; its numbers are in the table {FEW}.",
    ),
    "classes.png": (
        "Map of the classes",
        "Photos as points, near each other where their features are alike; a colour for each "
        "class. How well the classes separate is the metric of the method knn.",
    ),
}


def render_probe_page(report: ProbeReport, charts: Mapping[str, Mapping[str, bytes]]) -> str:
    """Render the page, with every picture inside it.

    Args:
        report: The report.
        charts: PNG of each chart, by its file name and then by its version: light, dark.

    Returns:
        The HTML.
    """
    title = f"Features on {report.about['data']['source']}"
    parts = [
        f"<h1>{escape_text(title)}</h1>",
        _summary(report),
        _cards(report),
        render_notes(report.notes),
        *[
            render_section(_chart_title(report, name), render_picture(text, charts[name]))
            for name, (_, text) in CHARTS.items()
            if name in charts
        ],
        render_section(TABLE, _rows_table(report)),
        _selected_section(report),
        _few_shot_section(report),
        _failed_section(report),
        render_section("Settings", _settings_table(report)),
    ]
    return render_document(title, parts)


def _chart_title(report: ProbeReport, name: str) -> str:
    """Return the heading of a chart; maps and few photos are those of one layer and pool."""
    if name == "layers.png":
        return CHARTS[name][0]
    model, layer, pool = best_feature(report)
    return f"{CHARTS[name][0]}: {short_name(model)}, layer {layer}, {pool}"


def _summary(report: ProbeReport) -> str:
    """Say how the photos were divided, in a sentence."""
    protocol, data = report.about["protocol"], report.about["data"]
    size = f"{count_noun(data['photos'], 'photo')}, {count_noun(len(report.labels), 'class')}"
    if protocol["kind"] == "folds":
        how = (
            f"measured by {protocol['folds']} folds: each photo by heads that were fitted and "
            "chosen without it"
        )
    else:
        how = (
            f"fitted and chosen on {count_noun(protocol['training_photos'], 'training photo')}, "
            f"measured on {count_noun(protocol['held_out_photos'], 'other')}"
        )
    return f'<p class="quiet">{escape_text(f"{size}; {how}.")}</p>'


def _cards(report: ProbeReport) -> str:
    """Render the chosen probe, its measure, and the best of the table."""
    cards = []
    title = TITLES[report.primary]
    if report.selected:
        row = report.selected[-1]
        span = _span(row.interval)
        text = f"{title}, layer and pool chosen inside the training part"
        cards.append(_card(f"{row.value:.3f}", text, span))
    if report.best is not None:
        best = report.best
        where = f"{short_name(best.model)}, C = {best.c:.3g}"
        cards.append(_card(f"layer {best.layer}, {best.pool}", "the best probe", where))
    top = max(report.rows, key=lambda row: row.value)
    text = f"{title}, highest of the table: {METHOD_NAMES[top.method]}"
    cards.append(_card(f"{top.value:.3f}", text, f"layer {top.layer}, {top.pool}"))
    measured = report.about["data"]["measured"]
    cards.append(_card(f"{measured}", "photos measured", ""))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(value: str, title: str, span: str) -> str:
    """Render a card."""
    small = f"<i>{escape_text(span)}</i>" if span else ""
    return (
        f'<div class="card"><b>{escape_text(value)}</b><span>{escape_text(title)}</span>{small}'
        "</div>"
    )


def _span(interval: tuple[float, float]) -> str:
    """Write an interval."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _text(value: object) -> Cell:
    """Make a cell of text."""
    return f"{value}", f"{value}"


def _optional(value: float | None, digits: int) -> Cell:
    """Make a cell of a number that may be absent."""
    if value is None or not math.isfinite(value):
        return DASH, ""
    return number_cell(value, lambda number: f"{number:.{digits}f}")


def _rows_table(report: ProbeReport) -> str:
    """Render the table, the highest first."""
    shown = sorted(report.rows, key=lambda row: -row.value)[:MAX_ROWS]
    several = len({row.model for row in report.rows}) > 1
    head = [
        "method and pool", "layer", TITLES[report.primary], "95 % interval", "over folds",
        "inside training", "mAP" if report.multi_label else "macro F1", "chosen", "ms a photo",
    ]  # fmt: skip
    other = "average_precision_score_macro" if report.multi_label else "f1_score_macro"
    rows = [_row_cells(row, several, other) for row in shown]
    more = len(report.rows) - len(shown)
    rest = f"<p>and {more} more, in probe.csv</p>" if more > 0 else ""
    note = (
        '<p class="quiet">Intervals: Wilson for shares of the photos, else the percentile '
        "bootstrap over photos. Over folds: the standard deviation of the folds. Inside training: "
        "photos of the training part that the fit did not see; layer and pool are chosen by it. "
        "The highest of many rows is better than the next photos will be.</p>"
    )
    return render_table(TABLE, head, rows, sortable=True) + rest + note


def _row_cells(row: ProbeRow, several: bool, other: str) -> list[Cell]:
    """Make the cells of a row."""
    name = f"{row.method}, {row.pool}"
    return [
        _text(f"{short_name(row.model)}: {name}" if several else name),
        _text(row.layer),
        _optional(row.value, 4),
        (_span(row.interval), f"{row.interval[0]:.6g}"),
        _optional(row.spread, 3),
        _optional(row.inner, 4),
        _optional(row.metrics.get(other), 4),
        (_choices(row.choices), ""),
        _optional(row.milliseconds, 1),
    ]


def _choices(choices: Sequence[Mapping[str, float]]) -> str:
    """Write what the rounds chose: a value, or the least and the greatest."""
    name = next(iter(choices[0]))
    values = sorted({choice[name] for choice in choices})
    text = f"{values[0]:.2g}" if len(values) == 1 else f"{values[0]:.2g} to {values[-1]:.2g}"
    return f"{name} {text}"


def _selected_section(report: ProbeReport) -> str:
    """Render the choice of layer and pool inside the training part; empty without one."""
    if not report.selected:
        return ""
    rows = [_selected_cells(row) for row in report.selected]
    note = (
        '<p class="quiet">Each round takes the layer and pool that are best inside its training '
        "part, by logistic regression, and is measured on photos outside of it.</p>"
    )
    head = ["model", TITLES[report.primary], "95 % interval", "chosen in each round"]
    title = "Layer and pool chosen by the photos"
    return render_section(title, render_table(title, head, rows) + note)


def _selected_cells(row: SelectedRow) -> list[Cell]:
    """Make the cells of a choice."""
    named = [f"layer {layer}, {pool}" for _, layer, pool in row.choices]
    if not row.model:
        models = [short_name(model) for model, _, _ in row.choices]
        named = [f"{model} {name}" for model, name in zip(models, named, strict=True)]
    counts = {name: named.count(name) for name in named}
    text = "; ".join(f"{name} ({n}x)" if n > 1 else name for name, n in counts.items())
    name = short_name(row.model) if row.model else "the model chosen, too"
    return [_text(name), _optional(row.value, 4), _text(_span(row.interval)), _text(text)]


def _few_shot_section(report: ProbeReport) -> str:
    """Render the results of few photos; empty without any."""
    if not report.few_shot:
        return ""
    shown = sorted(report.few_shot, key=lambda row: (row.per_class, -row.value))[:MAX_ROWS]
    several = len({row.model for row in report.few_shot}) > 1
    rows = [_few_cells(row, several) for row in shown]
    head = ["method and pool", "layer", "photos of a class", TITLES[report.primary],
            "over draws", "lowest", "highest"]  # fmt: skip
    more = len(report.few_shot) - len(shown)
    rest = f"<p>and {more} more, in probe.csv</p>" if more > 0 else ""
    return render_section(FEW, render_table(FEW, head, rows, sortable=True) + rest)


def _few_cells(row: FewShotRow, several: bool) -> list[Cell]:
    """Make the cells of a row of few photos."""
    name = f"{row.method}, {row.pool}"
    return [
        _text(f"{short_name(row.model)}: {name}" if several else name),
        _text(row.layer),
        _text(row.per_class),
        _optional(row.value, 4),
        _optional(row.spread, 3),
        _optional(min(row.tries), 4),
        _optional(max(row.tries), 4),
    ]


def _failed_section(report: ProbeReport) -> str:
    """List the photos that could not be used; empty without any."""
    if not report.failed:
        return ""
    rows = [[_text(file), _text(error)] for file, error in report.failed[:MAX_ROWS]]
    more = len(report.failed) - MAX_ROWS
    rest = f"<p>and {more} more, in probe.json</p>" if more > 0 else ""
    title = f"{count_noun(len(report.failed), 'photo')} could not be used"
    body = render_table(title, ["file", "error"], rows) + rest
    return render_section(title, f'<div class="texts">{body}</div>')


def _settings_table(report: ProbeReport) -> str:
    """Render models, data, protocol and versions as a table."""
    rows: list[list[Cell]] = [[_text("date"), _text(report.about["date"])]]
    for model in report.about["models"]:
        names = [f"{layer} {pool}" for layer, pool in model["features"]]
        listed = ", ".join(names[:40]) + ", …" * (len(names) > 40)
        rows.append([_text(f"model {model['name']}"), _text(f"layers and pools: {listed}")])
    if report.best is not None and report.best.folder is not None:
        text = f"{report.best.folder}, layout {report.best.layout}"
        rows.append([_text("checkpoint of the best probe"), _text(text)])
    for group in ("data", "protocol", "settings", "versions"):
        for name, value in report.about[group].items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            rows.append([_text(f"{group} {name}"), _text(DASH if text in (None, "") else text)])
    return f'<div class="texts">{render_table("Settings", ["setting", "value"], rows)}</div>'
