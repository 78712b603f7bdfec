"""Charts of a classifier's report, each readable with 2 classes and with 1000.

A chart is as wide as a phone's screen, where its text is legible; a page may enlarge it. Only the
matrix of 9 to 25 classes needs a wide screen.

Shapes: N photos, C classes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from vitlib.evaluate.palette import DARK, LIGHT, Palette
from vitlib.evaluate.report import Predictions, Report
from vitlib.metrics import confidences, confusion_matrix, reliability
from vitlib.plots.draw import ignore_in_layout, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHART_WIDTH = 3.5  # inches: 336 pixels of a page
DPI = 220  # 770 pixels, sharp on a dense screen
MAX_CLASSES = 25  # of a matrix or of bars
MAX_NUMBERED = 15  # classes of a matrix with room for numbers
MAX_NARROW = 8  # classes of a matrix that fits a phone
ROW = 0.36  # inches of a bar and its label


def draw_confusion(
    predictions: Predictions, report: Report, palette: Palette = LIGHT, *, narrow: bool = False
) -> Figure:
    """Draw the confusion matrix, or the most confused pairs where there are more than 25 classes.

    With several labels a photo, draw the true positives, false negatives and false positives of
    each class.

    Args:
        predictions: of the photos that can be read.
        report: of the same predictions.
        palette: colours.
        narrow: True if more than 8 classes are drawn as pairs, too, for a narrow page.

    Returns:
        The figure.
    """
    if report.multi_label:
        return _draw_class_counts(predictions, palette)
    if len(report.per_class) > (MAX_NARROW if narrow else MAX_CLASSES):
        return _draw_confused_pairs(report, palette)
    from matplotlib.colors import LinearSegmentedColormap

    matrix = confusion_matrix(predictions.targets, predictions.scores, multi_label=False)
    small = len(matrix) <= MAX_NARROW
    room = 0.9 if small else 1.5
    labels = [shorten(label, room, 8, middle=True) for label in predictions.photos.labels]
    side = CHART_WIDTH - 0.9 if small else 1.6 + 0.32 * len(labels)
    figure = report_figure(side + 0.9, side + 1.4)
    axes = figure.subplots()
    support = matrix.sum(axis=1, keepdims=True)
    shares = np.ma.masked_invalid(matrix / np.where(support, support, np.nan))
    axes.set_facecolor(palette.empty)
    # A list: matplotlib 3.8 takes a tuple of two for a colour and its opacity.
    colours = LinearSegmentedColormap.from_list("shares", list(palette.shares))
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.8, aspect=30, label="share of the true class"
    )
    bar.outline.set_visible(False)
    if len(labels) <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = palette.on_full if shares[row, column] > 0.55 else palette.ink
                axes.text(
                    column, row, f"{count}", ha="center", va="center", color=colour, fontsize=8
                )
    ticks = range(len(labels))
    axes.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="true")
    axes.set_xticklabels(labels, fontsize=8, rotation=90)
    axes.set_yticklabels(labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def draw_reliability(predictions: Predictions, report: Report, palette: Palette = LIGHT) -> Figure:
    """Draw accuracy over confidence, and below it the number of scores of each confidence.

    Args:
        predictions: of the photos that can be read.
        report: of the same predictions.
        palette: colours.

    Returns:
        The figure; with a calibration, both the calibrated and the uncalibrated scores.
    """
    raw = ("uncalibrated", predictions.raw_scores, palette.orange)
    kinds = [raw] if report.calibration else []
    name = "calibrated" if report.calibration else "uncalibrated"
    kinds.append((name, predictions.scores, palette.blue))
    figure = report_figure(CHART_WIDTH, 4.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color=palette.gray, linestyle="--", linewidth=1)
    for name, scores, colour in kinds:
        bins = reliability(*confidences(predictions.targets, scores, report.multi_label))
        filled = bins.counts > 0
        points = bins.confidence[filled], bins.accuracy[filled]
        top.plot(*points, color=colour, linewidth=1, alpha=0.5)
        # The area of a point is its share of the scores.
        areas = 8 + 200 * bins.counts[filled] / bins.counts.sum()
        top.scatter(*points, s=areas, color=colour, alpha=0.85, clip_on=False)
        top.plot([], [], "o", color=colour, label=f"{name}  ECE {bins.error:.3f}")
        edges = np.linspace(0, 1, len(bins.counts) + 1)
        bottom.stairs(bins.counts, edges, color=colour, fill=name == kinds[-1][0], alpha=0.75)
    multi_label = report.multi_label
    share = "share that has the class" if multi_label else "accuracy"
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=share)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center")
    xlabel = "score of a class" if multi_label else "confidence"
    bottom.set(xlabel=xlabel, ylabel="scores" if multi_label else "photos")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_class_counts(predictions: Predictions, palette: Palette) -> Figure:
    """Draw true positives, false negatives and false positives of each class as bars."""
    counts = confusion_matrix(predictions.targets, predictions.scores, True, predictions.thresholds)
    (_, fp), (fn, tp) = counts.transpose(1, 2, 0)
    labels = predictions.photos.labels
    rows = np.arange(len(labels))
    if len(labels) > MAX_CLASSES:
        rows = np.argsort(-(fp + fn), kind="stable")[:MAX_CLASSES]
    figure = report_figure(CHART_WIDTH, 1.5 + ROW * len(rows))
    axes = figure.subplots()
    ticks = np.arange(len(rows)) + 0.2
    for values, left, colour, name in (
        (tp, 0 * tp, palette.blue, "true positives"),
        (fn, tp, palette.gray, "false negatives"),
        (-fp, 0 * tp, palette.orange, "false positives"),
    ):
        axes.barh(ticks, values[rows], left=left[rows], color=colour, height=0.35, label=name)
    axes.set(xlabel="photos")
    # Of each bar alone, as the names stand above the bars.
    axes.vlines(0 * ticks, ticks - 0.25, ticks + 0.25, color=palette.ink, linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    _label_bars(axes, [(labels[i], "") for i in rows])
    title = f"the {MAX_CLASSES} classes with most errors" if len(labels) > MAX_CLASSES else None
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", title=title)
    return figure


def _draw_confused_pairs(report: Report, palette: Palette) -> Figure:
    """Draw the most confused pairs of classes as bars."""
    pairs = report.confused[:MAX_CLASSES]
    figure = report_figure(CHART_WIDTH, 1.0 + ROW * max(len(pairs), 2))
    axes = figure.subplots()
    if not pairs:
        axes.text(0.5, 0.5, "every prediction is correct", ha="center")
        axes.axis("off")
        return figure
    support = {row.label: row.support for row in report.per_class}
    counts = [count for _, _, count in pairs]
    axes.barh(np.arange(len(pairs)) + 0.2, counts, color=palette.orange, height=0.35)
    axes.set(xlabel="photos", xlim=(0, max(counts)))
    figure.suptitle("the most confused classes: true → predicted", fontsize=9)
    _label_bars(
        axes,
        [
            (f"{_fit(true)} → {_fit(predicted)}", f"{count} of {support[true]}")
            for true, predicted, count in pairs
        ],
    )
    return figure


def _fit(label: str) -> str:
    """Shorten a label to less than half of a chart; two of them must fit beside a number."""
    return shorten(label, 1.2, 8, middle=True)


def _label_bars(axes: Axes, rows: list[tuple[str, str]]) -> None:
    """Write a name, and a number at the right, above each bar: long names need no margin."""
    from matplotlib.ticker import MaxNLocator

    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "bottom"}
    for row, (name, number) in enumerate(rows):
        fitted = name if "→" in name else shorten(name, CHART_WIDTH - 0.3, 8)
        ignore_in_layout(axes.text(0, row - 0.02, fitted, fontsize=8, **beside))
        ignore_in_layout(axes.text(1, row - 0.02, number, fontsize=8, ha="right", **beside))
    axes.set(yticks=[], ylim=(len(rows) - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.spines[["top", "right", "left"]].set_visible(False)


def report_figure(width: float, height: float) -> Figure:
    """Make a figure at the resolution of reports.

    Args:
        width: in inches.
        height: in inches.

    Returns:
        The empty figure.
    """
    figure = new_figure(width, height)
    figure.set_dpi(DPI)
    return figure


def encode_figure(figure: Figure) -> bytes:
    """Encode a figure as PNG; the same figure gives the same bytes.

    Args:
        figure: made by report_figure().

    Returns:
        The file.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi, metadata={"Software": None})
    return file.getvalue()


def draw_versions(draw: Callable[[Palette], Figure]) -> dict[str, bytes]:
    """Draw a chart for light and for dark pages.

    Args:
        draw: draws it in a palette.

    Returns:
        PNG by version, "light" and "dark", for page.render_picture().
    """
    from matplotlib import rc_context

    versions = {}
    for version, palette in (("light", LIGHT), ("dark", DARK)):
        # Ticks take their colours when they are drawn: the settings last until then.
        with rc_context(palette.settings()):
            versions[version] = encode_figure(draw(palette))
    return versions
