"""ROC and precision-recall curves of a classifier's report.

Shapes: N photos, C classes, M points of a curve or scores of a class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.evaluate.figures import CHART_WIDTH, report_figure
from vitlib.evaluate.palette import LIGHT, Palette
from vitlib.evaluate.report import Predictions, Report
from vitlib.plots.draw import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
MAX_CURVES = 6  # classes with a curve of their own
MAX_POINTS = 1000  # of a curve


class Curve(NamedTuple):
    """ROC and precision-recall curve of one class, as its threshold falls.

    Attributes:
        name: text of the legend.
        tpr: (M,) true positive rate, which is the recall, 0..1.
        fpr: (M,) false positive rate, 0..1.
        precision: (M,) 0..1.
        auc: area under the ROC curve, 0..1.
        average_precision: 0..1.
    """

    name: str
    tpr: npt.NDArray[np.float64]
    fpr: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    auc: float
    average_precision: float


def select_curves(predictions: Predictions, report: Report, by: str) -> tuple[list[Curve], bool]:
    """Compute the curves of all classes pooled and of each class, or of the six lowest.

    Args:
        predictions: of the photos that can be read.
        report: of the same predictions.
        by: field of ClassRow that orders the classes.

    Returns:
        The curves, pooled first, and True if they are those of the lowest classes only.
    """
    has_class = predictions.targets
    if not report.multi_label:
        has_class = (has_class[:, None] == np.arange(len(report.per_class))).astype(np.float32)
    labelled = ~np.isnan(has_class)
    pooled = report.metrics["AUC_micro"], report.metrics["average_precision_score_micro"]
    curves = [
        _curve("all classes", has_class[labelled] == 1, predictions.scores[labelled], *pooled)
    ]
    split = [i for i, row in enumerate(report.per_class) if 0 < row.support < row.labelled]
    lowest = sorted(split, key=lambda i: getattr(report.per_class[i], by))[:MAX_CURVES]
    for index in sorted(lowest) if len(split) <= MAX_CURVES else lowest:
        row, mask = report.per_class[index], labelled[:, index]
        pair = has_class[mask, index] == 1, predictions.scores[mask, index]
        areas = row.AUC, row.average_precision_score
        curves.append(_curve(shorten(row.label, 1.6, 8), *pair, *areas))
    return [curve for curve in curves if len(curve.tpr)], len(split) > MAX_CURVES


def _curve(name: str, has_class: Array, scores: Array, auc: float, average: float) -> Curve:
    """Compute the curve of scores (M,); empty where the curve is undefined."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    tp, total = np.cumsum(has_class[order])[ends], int(has_class.sum())
    if not 0 < total < len(has_class):
        return Curve(name, *(np.empty(0),) * 3, auc, average)
    if len(ends) > MAX_POINTS:
        # Points evenly spaced in scores would crowd where neither rate changes.
        fp = ends + 1 - tp
        even = [np.searchsorted(x, np.linspace(x[0], x[-1], MAX_POINTS)) for x in (tp, fp)]
        sample = np.unique(np.concatenate(even))
        ends, tp = ends[sample], tp[sample]
    tpr, fpr = tp / total, (ends + 1 - tp) / (len(has_class) - total)
    precision = tp / (ends + 1)
    return Curve(
        name,
        np.concatenate([[0.0], tpr]),
        np.concatenate([[0.0], fpr]),
        np.concatenate([precision[:1], precision]),
        auc,
        average,
    )


def draw_precision_recall(
    curves: Sequence[Curve], lowest: bool, palette: Palette = LIGHT
) -> Figure:
    """Draw precision over recall.

    Args:
        curves: as `select_curves` gives them.
        lowest: True if the curves are those of the classes with the lowest average precision.
        palette: colours.

    Returns:
        The figure.
    """
    figure, axes = _square("recall", "precision", len(curves))
    for curve, style in _with_styles(curves, palette):
        label = f"{curve.name}  {curve.average_precision:.3f}"
        axes.step(curve.tpr, curve.precision, where="pre", label=label, **style)
    _legend(figure, axes, "average precision", lowest)
    return figure


def draw_roc(curves: Sequence[Curve], lowest: bool, palette: Palette = LIGHT) -> Figure:
    """Draw the true positive rate over the false positive rate; the dashed line is chance.

    Args:
        curves: as `select_curves` gives them.
        lowest: True if the curves are those of the classes with the lowest AUC.
        palette: colours.

    Returns:
        The figure.
    """
    figure, axes = _square("false positive rate", "true positive rate", len(curves))
    axes.plot([0, 1], [0, 1], color=palette.gray, linestyle="--", linewidth=1)
    for curve, style in _with_styles(curves, palette):
        axes.plot(curve.fpr, curve.tpr, label=f"{curve.name}  {curve.auc:.3f}", **style)
    _legend(figure, axes, "AUC", lowest)
    return figure


def _square(xlabel: str, ylabel: str, entries: int) -> tuple[Figure, Axes]:
    """Make axes of two rates, 0..1 each, with room for the entries of a legend."""
    figure = report_figure(CHART_WIDTH, CHART_WIDTH + 0.45 + 0.17 * entries)
    axes = figure.subplots()
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _with_styles(
    curves: Sequence[Curve], palette: Palette
) -> Iterator[tuple[Curve, dict[str, Any]]]:
    """Yield each curve with its colour: the pooled one in ink, the classes in colours."""
    for index, curve in enumerate(curves):
        colour = palette.curves[(index - 1) % MAX_CURVES] if index else palette.ink
        yield curve, {"color": colour, "linewidth": 1.4 if index else 2.2}


def _legend(figure: Figure, axes: Axes, metric: str, lowest: bool) -> None:
    """Add the legend, or say that there is no curve."""
    if axes.get_legend_handles_labels()[0]:
        title = f"{metric}: all classes pooled,\nand the lowest" if lowest else metric
        figure.legend(
            frameon=False, fontsize=8, loc="outside lower center", title=title,
            title_fontsize=8,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "undefined: a single class", ha="center")
