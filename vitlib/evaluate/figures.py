"""Figures of a classifier's report, each readable with 2 classes and with 1000.

Shapes: N photos, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitlib.errors import VitlibError
from vitlib.evaluate.report import Predictions, Report
from vitlib.image.processor import ImageProcessor
from vitlib.metrics import confidences, confusion_matrix, reliability
from vitlib.plots.draw import (
    BLUE,
    GRAY,
    INK,
    ORANGE,
    WIDTH,
    decode_upright,
    new_figure,
    shorten,
    show_image,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150  # 900 pixels in all, sharp on a dense screen
MAX_CLASSES = 25  # of a matrix or of bars
MAX_NUMBERED = 15  # classes of a matrix with room for numbers
MAX_MISTAKES = 12  # photos of the sheet
CAPTION_POINTS = 7


def draw_confusion(predictions: Predictions, report: Report) -> Figure:
    """Draw the confusion matrix, or the most confused pairs where there are more than 25 classes.

    With several labels a photo, draw the true positives, false negatives and false positives of
    each class.

    Args:
        predictions: of the photos that can be read.
        report: of the same predictions.

    Returns:
        The figure.
    """
    if report.multi_label:
        return _draw_class_counts(predictions)
    if len(report.per_class) > MAX_CLASSES:
        return _draw_confused_pairs(report)
    matrix = confusion_matrix(predictions.targets, predictions.scores, multi_label=False)
    labels = [shorten(label, 1.5, 8) for label in predictions.photos.labels]
    side = float(np.clip(1.6 + 0.42 * len(labels), 3.4, 9))
    figure = report_figure(side + 1.4, side)
    axes = figure.subplots()
    support = matrix.sum(axis=1, keepdims=True)
    shares = np.ma.masked_invalid(matrix / np.where(support, support, np.nan))
    axes.set_facecolor("#EEEEEE")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.75, label="share of the true class")
    if len(labels) <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.55 else INK
                axes.text(
                    column, row, f"{count}", ha="center", va="center", color=colour, fontsize=9
                )
    ticks = range(len(labels))
    axes.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="true")
    vertical: dict[str, Any] = {"rotation": 90, "ha": "center"}
    slanted: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticklabels(labels, fontsize=8, **(vertical if len(labels) > 8 else slanted))
    axes.set_yticklabels(labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def draw_reliability(predictions: Predictions, report: Report) -> Figure:
    """Draw accuracy over confidence, and below it the number of scores of each confidence.

    Args:
        predictions: of the photos that can be read.
        report: of the same predictions.

    Returns:
        The figure; with a calibration, both the calibrated and the uncalibrated scores.
    """
    kinds = [("uncalibrated", predictions.raw_scores, ORANGE)] if report.calibration else []
    name = "calibrated" if report.calibration else "uncalibrated"
    kinds.append((name, predictions.scores, BLUE))
    figure = report_figure(WIDTH * 0.85, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color=GRAY, linestyle="--", linewidth=1)
    for name, scores, colour in kinds:
        bins = reliability(*confidences(predictions.targets, scores, report.multi_label))
        filled = bins.counts > 0
        points = bins.confidence[filled], bins.accuracy[filled]
        top.plot(*points, color=colour, linewidth=1, alpha=0.5)
        # The area of a point is its share of the scores.
        areas = 12 + 300 * bins.counts[filled] / bins.counts.sum()
        top.scatter(*points, s=areas, color=colour, alpha=0.85, clip_on=False)
        top.plot([], [], "o", color=colour, label=f"{name}  ECE {bins.error:.3f}")
        edges = np.linspace(0, 1, len(bins.counts) + 1)
        bottom.stairs(bins.counts, edges, color=colour, fill=colour == BLUE, alpha=0.75)
    multi_label = report.multi_label
    share = "share that has the class" if multi_label else "accuracy"
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=share)
    figure.legend(frameon=False, fontsize=9, ncols=2, loc="outside upper center")
    xlabel = "score of a class" if multi_label else "confidence"
    bottom.set(xlabel=xlabel, ylabel="scores" if multi_label else "photos")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_mistakes(
    predictions: Predictions, processor: ImageProcessor | None = None
) -> Figure | None:
    """Draw the photos with the greatest loss among the wrong predictions, the worst first.

    Args:
        predictions: of the photos that can be read.
        processor: preprocessing that says how images deeper than 8 bits are shown.

    Returns:
        The figure, or None where every prediction is correct.
    """
    return draw_sheet(predictions, _worst(predictions), _caption, processor)


def draw_sheet(
    predictions: Predictions,
    indices: Sequence[int],
    caption: Callable[[Predictions, int, float], str],
    processor: ImageProcessor | None = None,
) -> Figure | None:
    """Draw photos in rows of four, each above its caption.

    Args:
        predictions: of the photos that can be read.
        indices: the photos to draw, by their index in `predictions`.
        caption: function of predictions, a photo's index and the width of a line in inches, which
            returns the text of the caption.
        processor: preprocessing that says how images deeper than 8 bits are shown.

    Returns:
        The figure, or None without indices.
    """
    if not indices:
        return None
    # Inches of a photo, and of its caption.
    columns, side, below = 4, WIDTH * 1.25 / 4, 0.5
    rows = -(-len(indices) // columns)
    height = rows * (side + below)
    figure = report_figure(side * columns, height)
    figure.set_layout_engine("none")  # axes are placed by hand
    for position, index in enumerate(indices):
        row, column = divmod(position, columns)
        bottom = 1 - (row * (side + below) + side) / height
        gap = 0.04 * side
        axes = figure.add_axes(
            ((column * side + gap) / (columns * side), bottom, 0.92 / columns, 0.92 * side / height)
        )
        axes.axis("off")
        try:
            small = decode_upright(predictions.photos.photos[index].path, processor)
        except VitlibError:  # the file can change or vanish after it was classified
            axes.text(0.5, 0.5, "no longer readable", ha="center", va="center", fontsize=7)
        else:
            small.thumbnail((round(side * DPI), round(side * DPI)))
            show_image(axes, small)
            axes.set_anchor("S")
        figure.text(
            (column + 0.5) / columns,
            bottom - 0.05 / height,
            caption(predictions, index, 0.9 * side),
            ha="center",
            va="top",
            fontsize=CAPTION_POINTS,
            color=INK,
        )
    return figure


def _draw_class_counts(predictions: Predictions) -> Figure:
    """Draw true positives, false negatives and false positives of each class as bars."""
    counts = confusion_matrix(predictions.targets, predictions.scores, True, predictions.thresholds)
    (_, fp), (fn, tp) = counts.transpose(1, 2, 0)
    labels = predictions.photos.labels
    rows = np.arange(len(labels))
    if len(labels) > MAX_CLASSES:
        rows = np.argsort(-(fp + fn), kind="stable")[:MAX_CLASSES]
    figure = report_figure(WIDTH, 1.2 + 0.3 * len(rows))
    axes = figure.subplots()
    ticks = range(len(rows))
    axes.barh(ticks, tp[rows], color=BLUE, height=0.7, label="true positives")
    axes.barh(ticks, fn[rows], left=tp[rows], color=GRAY, height=0.7, label="false negatives")
    axes.barh(ticks, -fp[rows], color=ORANGE, height=0.7, label="false positives")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(yticks=ticks, ylim=(len(rows) - 0.5, -0.5), xlabel="photos")
    axes.set_yticklabels([shorten(labels[i], 1.8, 8) for i in rows], fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    _whole_numbers(axes)
    title = f"the {MAX_CLASSES} classes with most errors" if len(labels) > MAX_CLASSES else None
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper center", title=title)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _draw_confused_pairs(report: Report) -> Figure:
    """Draw the most confused pairs of classes as bars."""
    pairs = report.confused[:MAX_CLASSES]
    figure = report_figure(WIDTH, 1.0 + 0.3 * max(len(pairs), 2))
    axes = figure.subplots()
    if not pairs:
        axes.text(0.5, 0.5, "every prediction is correct", ha="center", color=INK)
        axes.axis("off")
        return figure
    support = {row.label: row.support for row in report.per_class}
    ticks, counts = range(len(pairs)), [count for _, _, count in pairs]
    axes.barh(ticks, counts, color=ORANGE, height=0.7)
    for tick, (true, _, count) in zip(ticks, pairs, strict=True):
        axes.text(count, tick, f" {count} of {support[true]}", va="center", fontsize=8, color=INK)
    axes.set(
        yticks=ticks, ylim=(len(pairs) - 0.5, -0.5), xlim=(0, max(counts) * 1.15),
        xlabel="photos",
    )  # fmt: skip
    figure.suptitle("the most confused classes: true → predicted", fontsize=10, color=INK)
    names = [
        f"{shorten(true, 1.4, 8)} → {shorten(predicted, 1.4, 8)}" for true, predicted, _ in pairs
    ]
    axes.set_yticklabels(names, fontsize=8)
    _whole_numbers(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _worst(predictions: Predictions) -> list[int]:
    """Select the photos with wrong predictions, those with the greatest loss first."""
    scores, tiny = predictions.scores.astype(np.float64), 1e-30
    if predictions.photos.multi_label:
        labelled, y_true = ~np.isnan(predictions.targets), predictions.targets == 1
        likelihood = np.where(y_true, scores, 1 - scores).clip(tiny)
        loss = np.where(labelled, -np.log(likelihood), 0).sum(axis=1)
        loss /= labelled.sum(axis=1).clip(1)
        wrong = (labelled & (y_true != predictions.y_pred)).any(axis=1)
    else:
        loss = -np.log(scores[np.arange(len(scores)), predictions.targets].clip(tiny))
        wrong = predictions.y_pred != predictions.targets
    order = np.argsort(-loss, kind="stable")
    return [int(index) for index in order[wrong[order]][:MAX_MISTAKES]]


def _caption(predictions: Predictions, index: int, room: float) -> str:
    """Name the true and the predicted classes; room: width of a line in inches."""
    labels, scores = predictions.photos.labels, predictions.scores[index]
    y_pred = predictions.y_pred[index]
    if predictions.photos.multi_label:
        truth = predictions.targets[index]
        kinds = {"missed": (truth == 1) & ~y_pred, "wrong": (truth == 0) & y_pred}
        lines = [f"true {', '.join(predictions.photos.photos[index].labels) or 'none'}"]
        for kind, mask in kinds.items():
            names = ", ".join(f"{labels[i]} {scores[i]:.2f}" for i in np.flatnonzero(mask))
            lines += [f"{kind} {names}"] * bool(names)
    else:
        lines = [
            f"true {labels[predictions.targets[index]]}",
            f"predicted {labels[y_pred]} {scores[y_pred]:.2f}",
        ]
    return "\n".join(shorten(line, room, CAPTION_POINTS) for line in lines)


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


def _whole_numbers(axes: Axes) -> None:
    """Label the x axis with integers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
