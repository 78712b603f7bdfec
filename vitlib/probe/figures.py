"""Charts of a probe's report: metric by layer, metric by number of photos, and maps of the classes.

Shapes: N photos of a map, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vitlib.evaluate.figures import CHART_WIDTH, report_figure
from vitlib.evaluate.html_report import TITLES
from vitlib.evaluate.palette import LIGHT, Palette
from vitlib.plots.draw import ignore_in_layout, shorten
from vitlib.probe.results import ProbeReport, ProbeRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHOD_NAMES = {"knn": "kNN", "logistic": "logistic regression", "linear": "linear head, SGD"}
LINES = {"logistic": "-", "knn": "--", "linear": ":"}
MARKERS = ("o", "^", "s", "D")
ROW = 0.36  # inches of a dot and its label
MAX_ROWS = 40  # dots of a chart of single layers


def draw_layers(report: ProbeReport, palette: Palette = LIGHT) -> Figure:
    """Draw the metric over the layer; of a single layer, a dot with its interval for each row.

    Args:
        report: The report.
        palette: Colours.

    Returns:
        The figure.
    """
    if len({row.layer for row in report.rows}) == 1:
        return _draw_dots(report, palette)
    groups: dict[tuple[str, str], list[ProbeRow]] = {}
    for row in report.rows:
        groups.setdefault((row.model, row.pool), []).append(row)
    methods = list(dict.fromkeys(row.method for row in report.rows))
    figure = report_figure(CHART_WIDTH, 3.3 + 0.17 * (len(groups) + len(methods)))
    axes = figure.subplots()
    for number, ((model, pool), rows) in enumerate(groups.items()):
        colour = palette.curves[number % len(palette.curves)]
        for method in methods:
            points = [(row.layer, row.value, row.interval) for row in rows if row.method == method]
            layers, values, ends = zip(*sorted(points), strict=True)
            style: dict[str, Any] = {"color": colour, "linestyle": LINES[method], "markersize": 3.5}
            axes.plot(layers, values, marker=MARKERS[number % len(MARKERS)], **style)
            # Bands of every method would cover each other.
            if method == "logistic":
                low, high = zip(*ends, strict=True)
                axes.fill_between(layers, low, high, color=colour, alpha=0.12, linewidth=0)
        name = pool if len({model for model, _ in groups}) == 1 else f"{short_name(model)}, {pool}"
        axes.plot([], [], color=colour, marker=MARKERS[number % len(MARKERS)], markersize=3.5,
                  label=_legend_text(name))  # fmt: skip
    for method in methods:
        axes.plot([], [], color=palette.ink, linestyle=LINES[method], label=METHOD_NAMES[method])
    axes.set(xlabel="layer (blocks passed)", ylabel=TITLES[report.primary])
    _integer_axis(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    return figure


def _integer_axis(axes: Axes) -> None:
    """Mark whole numbers alone on the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def _draw_dots(report: ProbeReport, palette: Palette) -> Figure:
    """Draw a dot with its interval for each row, the best first."""
    rows = sorted(report.rows, key=lambda row: -row.value)[:MAX_ROWS]
    several = len({row.model for row in rows}) > 1
    figure = report_figure(CHART_WIDTH, 0.9 + ROW * len(rows))
    axes = figure.subplots()
    for number, row in enumerate(rows):
        low, high = row.interval
        position = number + 0.2
        axes.plot([low, high], [position] * 2, color=palette.blue, linewidth=2, alpha=0.45)
        axes.plot([row.value], [position], "o", color=palette.blue, markersize=5)
        name = f"{METHOD_NAMES[row.method]}, {row.pool}"
        name = f"{short_name(row.model)}: {name}" if several else name
        beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "bottom"}
        text = shorten(name, CHART_WIDTH - 0.9, 8)
        ignore_in_layout(axes.text(0, number - 0.02, text, fontsize=8, **beside))
        ignore_in_layout(
            axes.text(1, number - 0.02, f"{row.value:.3f}", fontsize=8, ha="right", **beside)
        )
    axes.set(yticks=[], ylim=(len(rows) - 0.5, -0.5), xlabel=TITLES[report.primary])
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def draw_few_shot(report: ProbeReport, palette: Palette = LIGHT) -> Figure:
    """Draw the metric of the best layer and pool over the number of photos of a class.

    Args:
        report: The report, with results of few photos.
        palette: Colours.

    Returns:
        The figure.
    """
    model, layer, pool = best_feature(report)
    rows = [r for r in report.few_shot if (r.model, r.layer, r.pool) == (model, layer, pool)]
    figure = report_figure(CHART_WIDTH, 3.2)
    axes = figure.subplots()
    counts = sorted({row.per_class for row in rows})
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        chosen = sorted((r for r in rows if r.method == method), key=lambda row: row.per_class)
        feature = model, layer, pool, method
        whole = next(
            row.value
            for row in report.rows
            if (row.model, row.layer, row.pool, row.method) == feature
        )
        values = [row.value for row in chosen]
        colour = palette.curves[number]
        # Side by side, so that the bars of two methods do not hide each other.
        ticks = np.arange(len(values)) + 0.06 * number
        axes.errorbar(ticks, values, yerr=[row.spread for row in chosen], fmt="o-", color=colour,
                      markersize=4, capsize=2, label=METHOD_NAMES[method])  # fmt: skip
        axes.plot([ticks[-1], len(counts)], [values[-1], whole], color=colour, linestyle=":")
        axes.plot([len(counts)], [whole], "o", color=colour, markersize=4)
    axes.set(
        xticks=range(len(counts) + 1), xlabel="photos of a class", ylabel=TITLES[report.primary]
    )
    axes.set_xticklabels([*map(str, counts), "all"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def draw_classes(
    maps: Sequence[tuple[str, npt.NDArray[np.float32]]],
    names: Sequence[str],
    palette: Palette = LIGHT,
) -> Figure:
    """Draw maps of photos, one below the other, a colour and a marker for each class.

    Args:
        maps: Title and points (N, 2) of each.
        names: (N,) class of each photo, or its labels together.
        palette: Colours; classes beyond 24 are gray.

    Returns:
        The figure.
    """
    order = [name for name, _ in Counter(names).most_common()]
    most = len(palette.curves) * len(MARKERS)
    shown = sorted(order[:most])
    entries = len(shown) + (len(order) > most)
    figure = report_figure(CHART_WIDTH, 2.9 * len(maps) + 0.3 + 0.17 * ((entries + 1) // 2))
    panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    members = {name: np.flatnonzero([other == name for other in names]) for name in shown}
    others = np.flatnonzero([name not in members for name in names])
    for axes, (title, points) in zip(panels, maps, strict=True):
        axes.set_title(title, fontsize=9)
        if len(others):
            axes.scatter(*points[others].T, s=8, color=palette.gray, linewidths=0,
                         label=f"{len(order) - most} others")  # fmt: skip
        for number, name in enumerate(shown):
            axes.scatter(
                *points[members[name]].T, s=14, linewidths=0, alpha=0.85,
                color=palette.curves[number % len(palette.curves)],
                marker=MARKERS[number // len(palette.curves)],
                label=_legend_text(name),
            )  # fmt: skip
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(palette.gray)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _legend_text(name: str) -> str:
    """Shorten a name for half of a legend; matplotlib would hide one that starts with "_"."""
    text = shorten(name, CHART_WIDTH / 2 - 0.5, 8, middle=True)
    return f" {text}" if text.startswith("_") else text


def best_feature(report: ProbeReport) -> tuple[str, int, str]:
    """Return model, layer and pool that the report shows: the best, or the first.

    Args:
        report: The report.

    Returns:
        (model, layer, pool).
    """
    best = report.best or report.rows[0]
    return best.model, best.layer, best.pool


def short_name(model: str) -> str:
    """Return the last part of a path or a hub id.

    Args:
        model: Name of a model.

    Returns:
        The part; the whole name where it is empty.
    """
    return model.rstrip("/").rpartition("/")[2] or model
