"""Figures of a regression's report: predicted over true, the errors, the worst photos.

Shapes: N photos, C outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vitlib.evaluate.figures import CAPTION_POINTS, DPI, MAX_MISTAKES, draw_sheet
from vitlib.evaluate.report import Predictions, Report
from vitlib.image.processor import ImageProcessor
from vitlib.plots.draw import BLUE, GRAY, INK, WIDTH, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_OUTPUTS = 6  # in a figure: those with the lowest r2_score
BINS = 30


def draw_predicted(predictions: Predictions, report: Report) -> Figure:
    """Draw predicted over true numbers, axes for each output; the dashed line is equality.

    Args:
        predictions: of the photos that can be read.
        report: of the same predictions.

    Returns:
        The figure.
    """
    outputs = _select_outputs(report)
    figure = new_figure(WIDTH, WIDTH * 0.5 * -(-len(outputs) // 2) + 0.6)
    figure.set_dpi(DPI)
    columns = min(2, len(outputs))
    grid = figure.subplots(-(-len(outputs) // 2), columns, squeeze=False)
    for axes in grid.flat[len(outputs) :]:
        axes.axis("off")
    for axes, index in zip(grid.flat, outputs, strict=False):
        y_true, y_pred = predictions.targets[:, index], predictions.scores[:, index]
        ends = [min(y_true.min(), y_pred.min()), max(y_true.max(), y_pred.max())]
        axes.plot(ends, ends, color=GRAY, linestyle="--", linewidth=1)
        axes.scatter(y_true, y_pred, s=10, color=BLUE, alpha=0.5, linewidths=0)
        row = report.per_output[index]
        axes.set_title(f"{shorten(row.label, 2, 9)}  R2 {row.r2_score:.3f}", fontsize=9, color=INK)
        axes.set(xlabel="true", ylabel="predicted")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_errors(predictions: Predictions, report: Report) -> Figure:
    """Draw a histogram of the errors, axes for each output.

    Args:
        predictions: of the photos that can be read.
        report: of the same predictions.

    Returns:
        The figure.
    """
    outputs = _select_outputs(report)
    figure = new_figure(WIDTH, 1.6 * len(outputs) + 0.6)
    figure.set_dpi(DPI)
    for axes, index in zip(
        figure.subplots(len(outputs), 1, squeeze=False).flat, outputs, strict=True
    ):
        error = predictions.scores[:, index].astype(np.float64) - predictions.targets[:, index]
        axes.hist(error, bins=min(BINS, max(5, len(error) // 5)), color=BLUE, alpha=0.8)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(ylabel="photos")
        name = shorten(report.per_output[index].label, WIDTH - 2, 9)
        axes.set_xlabel(f"{name}: predicted - true", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_worst(predictions: Predictions, processor: ImageProcessor | None = None) -> Figure | None:
    """Draw the photos with the greatest error, in standard deviations of the output.

    Args:
        predictions: of the photos that can be read.
        processor: preprocessing that says how images deeper than 8 bits are shown.

    Returns:
        The figure, or None where every number is exact.
    """
    return draw_sheet(predictions, _worst(predictions), _caption, processor)


def _select_outputs(report: Report) -> list[int]:
    """Select the outputs with the lowest r2_score, in their own order."""
    order = np.argsort([row.r2_score for row in report.per_output], kind="stable")
    return sorted(order[:MAX_OUTPUTS].tolist())


def _worst(predictions: Predictions) -> list[int]:
    """Select the photos with the greatest errors, the worst first."""
    errors = _scaled_errors(predictions).max(axis=1)
    order = np.argsort(-errors, kind="stable")[:MAX_MISTAKES]
    return [int(index) for index in order if errors[index] > 0]


def _scaled_errors(predictions: Predictions) -> npt.NDArray[np.float64]:
    """Compute absolute errors in standard deviations of the output, (N, C)."""
    y_true = predictions.targets.astype(np.float64)
    spread = y_true.std(axis=0)
    return np.asarray(np.abs(predictions.scores - y_true) / np.where(spread > 0, spread, 1))


def _caption(predictions: Predictions, index: int, room: float) -> str:
    """Name the output with the greatest error; room: width of a line in inches."""
    output = int(_scaled_errors(predictions)[index].argmax())
    y_true, y_pred = predictions.targets[index, output], predictions.scores[index, output]
    lines = [f"{predictions.photos.labels[output]} {y_true:.5g}", f"predicted {y_pred:.5g}"]
    return "\n".join(shorten(line, room, CAPTION_POINTS) for line in lines)
