"""The pictures of a regression's report: predicted over true, the errors, the worst photos.

Shapes: N photos, C outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vitlib.evaluate.figures import CAPTION, DOTS, MISTAKES, sheet
from vitlib.evaluate.report import Answers, Report
from vitlib.image.processor import ImageProcessor
from vitlib.plots.draw import BLUE, GRAY, INK, WIDTH, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_OUTPUTS = 6  # that are drawn: those with the lowest r2_score
BINS = 30


def predicted(answers: Answers, report: Report) -> Figure:
    """Predicted over true, an output a picture; the dashes are where both are equal."""
    outputs = _shown(report)
    figure = new_figure(WIDTH, WIDTH * 0.5 * -(-len(outputs) // 2) + 0.6)
    figure.set_dpi(DOTS)
    columns = min(2, len(outputs))
    grid = figure.subplots(-(-len(outputs) // 2), columns, squeeze=False)
    for axes in grid.flat[len(outputs) :]:
        axes.axis("off")
    for axes, index in zip(grid.flat, outputs, strict=False):
        true, said = answers.targets[:, index], answers.scores[:, index]
        ends = [min(true.min(), said.min()), max(true.max(), said.max())]
        axes.plot(ends, ends, color=GRAY, linestyle="--", linewidth=1)
        axes.scatter(true, said, s=10, color=BLUE, alpha=0.5, linewidths=0)
        row = report.per_output[index]
        axes.set_title(f"{short(row.label, 2, 9)}  R2 {row.r2_score:.3f}", fontsize=9, color=INK)
        axes.set(xlabel="true", ylabel="predicted")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def errors(answers: Answers, report: Report) -> Figure:
    """How many photos are off by how much, an output a picture."""
    outputs = _shown(report)
    figure = new_figure(WIDTH, 1.6 * len(outputs) + 0.6)
    figure.set_dpi(DOTS)
    for axes, index in zip(
        figure.subplots(len(outputs), 1, squeeze=False).flat, outputs, strict=True
    ):
        off = answers.scores[:, index].astype(np.float64) - answers.targets[:, index]
        axes.hist(off, bins=min(BINS, max(5, len(off) // 5)), color=BLUE, alpha=0.8)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(ylabel="photos")
        name = short(report.per_output[index].label, WIDTH - 2, 9)
        axes.set_xlabel(f"{name}: predicted - true", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def worst(answers: Answers, processor: ImageProcessor | None = None) -> Figure | None:
    """A sheet of the photos that are most off, each output in units of its spread; None: none is
    off."""
    return sheet(answers, _most_off(answers), _caption, processor)


def _shown(report: Report) -> list[int]:
    """The outputs that are drawn, in their order."""
    order = np.argsort([row.r2_score for row in report.per_output], kind="stable")
    return sorted(order[:MOST_OUTPUTS].tolist())


def _most_off(answers: Answers) -> list[int]:
    far = _off(answers).max(axis=1)
    order = np.argsort(-far, kind="stable")[:MISTAKES]
    return [int(index) for index in order if far[index] > 0]


def _off(answers: Answers) -> npt.NDArray[np.float64]:
    """How far each number is off, in units of its output's spread, (N, C)."""
    true = answers.targets.astype(np.float64)
    spread = true.std(axis=0)
    return np.asarray(np.abs(answers.scores - true) / np.where(spread > 0, spread, 1))


def _caption(answers: Answers, index: int, room: float) -> str:
    """Of the output that is most off, what is true and what was said; room: inches a line."""
    output = int(_off(answers)[index].argmax())
    true, said = answers.targets[index, output], answers.scores[index, output]
    lines = [f"{answers.photos.labels[output]} {true:.5g}", f"said {said:.5g}"]
    return "\n".join(short(line, room, CAPTION) for line in lines)
