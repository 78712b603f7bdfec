"""Figures of a regression's report: predicted over true, and the errors.

Shapes: N photos, C outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vitlib.evaluate.figures import CHART_WIDTH, report_figure
from vitlib.evaluate.palette import LIGHT, Palette
from vitlib.evaluate.report import Predictions, Report
from vitlib.plots.draw import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_OUTPUTS = 6  # in a figure: those with the lowest r2_score
BINS = 30


def draw_predicted(predictions: Predictions, report: Report, palette: Palette = LIGHT) -> Figure:
    """Draw predicted over true numbers, axes for each output; the dashed line is equality.

    Args:
        predictions: of the photos that can be read.
        report: of the same predictions.
        palette: colours.

    Returns:
        The figure.
    """
    outputs = _select_outputs(report)
    # A single column, which a phone shows without shrinking.
    figure = report_figure(CHART_WIDTH, 3.0 * len(outputs))
    grid = figure.subplots(len(outputs), 1, squeeze=False)
    for axes, index in zip(grid.flat, outputs, strict=True):
        y_true, y_pred = predictions.targets[:, index], predictions.scores[:, index]
        ends = [min(y_true.min(), y_pred.min()), max(y_true.max(), y_pred.max())]
        axes.plot(ends, ends, color=palette.gray, linestyle="--", linewidth=1)
        axes.scatter(y_true, y_pred, s=10, color=palette.blue, alpha=0.5, linewidths=0)
        row = report.per_output[index]
        axes.set_title(
            f"{shorten(row.label, 2, 9)}  R2 {row.r2_score:.3f}", fontsize=9, color=palette.ink
        )
        axes.set(xlabel="true", ylabel="predicted")
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_errors(predictions: Predictions, report: Report, palette: Palette = LIGHT) -> Figure:
    """Draw a histogram of the errors, axes for each output.

    Args:
        predictions: of the photos that can be read.
        report: of the same predictions.
        palette: colours.

    Returns:
        The figure.
    """
    outputs = _select_outputs(report)
    figure = report_figure(CHART_WIDTH, 1.6 * len(outputs) + 0.6)
    for axes, index in zip(
        figure.subplots(len(outputs), 1, squeeze=False).flat, outputs, strict=True
    ):
        error = predictions.scores[:, index].astype(np.float64) - predictions.targets[:, index]
        axes.hist(error, bins=min(BINS, max(5, len(error) // 5)), color=palette.blue, alpha=0.8)
        axes.axvline(0, color=palette.ink, linewidth=0.8)
        axes.set(ylabel="photos")
        axes.locator_params(axis="x", nbins=5)
        name = shorten(report.per_output[index].label, CHART_WIDTH - 1.8, 8)
        axes.set_xlabel(f"{name}: predicted - true", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _select_outputs(report: Report) -> list[int]:
    """Select the outputs with the lowest r2_score, in their own order."""
    order = np.argsort([row.r2_score for row in report.per_output], kind="stable")
    return sorted(order[:MAX_OUTPUTS].tolist())
