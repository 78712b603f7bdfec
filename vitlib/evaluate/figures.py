"""The pictures of a report, each readable with 2 classes and with 1000.

Shapes: N photos, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.errors import VitlibError
from vitlib.evaluate.report import Answers, Report
from vitlib.image.processor import ImageProcessor
from vitlib.metrics import confidences, confusion_matrix, reliability
from vitlib.plots.draw import BLUE, GRAY, INK, ORANGE, WIDTH, new_figure, picture, short, upright

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
DOTS = 150  # an inch: 900 pixels, sharp on a screen of fine ones
MOST_SHOWN = 25  # classes of a matrix or of bars
NUMBERED = 15  # classes of a matrix that has room for numbers
CURVES = 6  # classes of their own curve
POINTS = 1000  # of a curve
MISTAKES = 12  # photos of the sheet
CAPTION = 7  # points
# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


class Curve(NamedTuple):
    """Right and wrong answers as the threshold falls, and what the legend says."""

    name: str
    right: npt.NDArray[np.float64]  # share of those that have it, found
    false: npt.NDArray[np.float64]  # share of those that lack it, found
    precision: npt.NDArray[np.float64]  # share of the found that have it
    auc: float
    average_precision: float


def confusion(answers: Answers, report: Report) -> Figure:
    """What was taken for what: of up to 25 classes the matrix, of more the pairs that were confused
    most; with several labels a photo, what was found, missed and wrongly said of each class."""
    if report.multi_label:
        return _found_and_missed(answers)
    if len(report.per_class) > MOST_SHOWN:
        return _most_confused(report)
    matrix = confusion_matrix(answers.targets, answers.scores, multi_label=False)
    labels = [short(label, 1.5, 8) for label in answers.photos.labels]
    side = float(np.clip(1.6 + 0.42 * len(labels), 3.4, 9))
    figure = _figure(side + 1.4, side)
    axes = figure.subplots()
    support = matrix.sum(axis=1, keepdims=True)
    shares = np.ma.masked_invalid(matrix / np.where(support, support, np.nan))
    axes.set_facecolor("#EEEEEE")
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=axes, shrink=0.75, label="share of the row")
    if len(labels) <= NUMBERED:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 0.55 else INK
                axes.text(
                    column, row, f"{count}", ha="center", va="center", color=colour, fontsize=9
                )
    places = range(len(labels))
    axes.set(xticks=places, yticks=places, xlabel="said", ylabel="true")
    upright_names: dict[str, Any] = {"rotation": 90, "ha": "center"}
    slanted: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticklabels(labels, fontsize=8, **(upright_names if len(labels) > 8 else slanted))
    axes.set_yticklabels(labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def precision_recall(curves: Sequence[Curve], lowest: bool) -> Figure:
    """Precision over recall; lowest: the classes are those that do worst."""
    figure, axes = _square("recall", "precision")
    for curve, style in _styled(curves):
        label = f"{curve.name}  {curve.average_precision:.3f}"
        axes.step(curve.right, curve.precision, where="pre", label=label, **style)
    _legend(figure, axes, "average precision", lowest)
    return figure


def roc(curves: Sequence[Curve], lowest: bool) -> Figure:
    """Found of those that have it, over found of those that lack it; the dashes are chance."""
    figure, axes = _square("false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color=GRAY, linestyle="--", linewidth=1)
    for curve, style in _styled(curves):
        axes.plot(curve.false, curve.right, label=f"{curve.name}  {curve.auc:.3f}", **style)
    _legend(figure, axes, "AUC", lowest)
    return figure


def reliable(answers: Answers, report: Report) -> Figure:
    """How often the model was right, over how sure it was; below, how many scores are so sure."""
    kinds = [("as the model says", answers.raw, ORANGE)] if report.calibration else []
    name = "calibrated" if report.calibration else "as the model says"
    kinds.append((name, answers.scores, BLUE))
    figure = _figure(WIDTH * 0.85, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color=GRAY, linestyle="--", linewidth=1)
    for name, scores, colour in kinds:
        sure, right = confidences(answers.targets, scores, report.multi_label)
        found = reliability(sure, right)
        there = found.counts > 0
        points = found.confidence[there], found.accuracy[there]
        top.plot(*points, color=colour, linewidth=1, alpha=0.5)
        # The area of a point is its share of the scores.
        areas = 12 + 300 * found.counts[there] / found.counts.sum()
        top.scatter(*points, s=areas, color=colour, alpha=0.85, clip_on=False)
        top.plot([], [], "o", color=colour, label=f"{name}  ECE {found.error:.3f}")
        edges = np.linspace(0, 1, len(found.counts) + 1)
        bottom.stairs(found.counts, edges, color=colour, fill=colour == BLUE, alpha=0.75)
    several = report.multi_label
    share = "share that has the class" if several else "share that is right"
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=share)
    figure.legend(frameon=False, fontsize=9, ncols=2, loc="outside upper center")
    what = "score of a class" if several else "score of the answer"
    bottom.set(xlabel=what, ylabel="scores" if several else "photos")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def mistakes(answers: Answers, processor: ImageProcessor | None = None) -> Figure | None:
    """A sheet of the wrong answers with the greatest loss, the worst first; None: none is wrong."""
    return sheet(answers, _worst(answers), _caption, processor)


def sheet(
    answers: Answers,
    worst: Sequence[int],
    caption: Callable[[Answers, int, float], str],
    processor: ImageProcessor | None = None,
) -> Figure | None:
    """Photos by their numbers, each with its caption below; None: there are none.

    caption: answers, a photo's number and the inches of a line -> its text.
    """
    if not worst:
        return None
    columns, side, below = 4, WIDTH * 1.25 / 4, 0.5  # inches of a photo, and of its caption
    rows = -(-len(worst) // columns)
    height = rows * (side + below)
    figure = _figure(side * columns, height)
    figure.set_layout_engine("none")  # every place is known
    for place, index in enumerate(worst):
        row, column = divmod(place, columns)
        bottom = 1 - (row * (side + below) + side) / height
        gap = 0.04 * side
        axes = figure.add_axes(
            ((column * side + gap) / (columns * side), bottom, 0.92 / columns, 0.92 * side / height)
        )
        axes.axis("off")
        try:
            small = upright(answers.photos.photos[index].path, processor)
        except VitlibError:  # it was there when it was classified
            axes.text(0.5, 0.5, "cannot be read any more", ha="center", va="center", fontsize=7)
        else:
            small.thumbnail((round(side * DOTS), round(side * DOTS)))
            picture(axes, small)
            axes.set_anchor("S")
        figure.text(
            (column + 0.5) / columns, bottom - 0.05 / height, caption(answers, index, 0.9 * side),
            ha="center", va="top", fontsize=CAPTION, color=INK,
        )  # fmt: skip
    return figure


def curves_of(answers: Answers, report: Report, by: str) -> tuple[list[Curve], bool]:
    """Curves of all answers together and of each class, or of the six that do worst by a field of
    ClassRow; and whether it is those."""
    has = answers.targets
    if not report.multi_label:
        has = (has[:, None] == np.arange(len(report.per_class))).astype(np.float32)
    known = ~np.isnan(has)
    pooled = report.metrics["AUC_micro"], report.metrics["average_precision_score_micro"]
    found = [_curve("all together", has[known] == 1, answers.scores[known], *pooled)]
    there = [i for i, row in enumerate(report.per_class) if 0 < row.support < row.known]
    shown = sorted(there, key=lambda i: getattr(report.per_class[i], by))[:CURVES]
    for index in sorted(shown) if len(there) <= CURVES else shown:
        row, rest = report.per_class[index], known[:, index]
        pair = has[rest, index] == 1, answers.scores[rest, index]
        numbers = row.AUC, row.average_precision_score
        found.append(_curve(short(row.label, 1.6, 8), *pair, *numbers))
    return [curve for curve in found if len(curve.right)], len(there) > CURVES


def _curve(name: str, has: Array, sure: Array, auc: float, average: float) -> Curve:
    order = np.argsort(-sure, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(sure[order])), len(order) - 1)
    right, total = np.cumsum(has[order])[ends], int(has.sum())
    if not 0 < total < len(has):
        return Curve(name, *(np.empty(0),) * 3, auc, average)
    if len(ends) > POINTS:
        # As dense along recall as along the false ones: scores crowd where neither moves.
        wrong = ends + 1 - right
        even = [np.searchsorted(x, np.linspace(x[0], x[-1], POINTS)) for x in (right, wrong)]
        kept = np.unique(np.concatenate(even))
        ends, right = ends[kept], right[kept]
    found = right / total
    false, precision = (ends + 1 - right) / (len(has) - total), right / (ends + 1)
    start = np.concatenate
    return Curve(
        name, start([[0.0], found]), start([[0.0], false]), start([precision[:1], precision]),
        auc, average,
    )  # fmt: skip


def _found_and_missed(answers: Answers) -> Figure:
    counts = confusion_matrix(answers.targets, answers.scores, True, answers.limits)
    (_, wrong), (missed, found) = counts.transpose(1, 2, 0)
    labels = answers.photos.labels
    shown = np.arange(len(labels))
    if len(labels) > MOST_SHOWN:
        shown = np.argsort(-(wrong + missed), kind="stable")[:MOST_SHOWN]
    figure = _figure(WIDTH, 1.2 + 0.3 * len(shown))
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(places, found[shown], color=BLUE, height=0.7, label="found")
    axes.barh(places, missed[shown], left=found[shown], color=GRAY, height=0.7, label="missed")
    axes.barh(places, -wrong[shown], color=ORANGE, height=0.7, label="said, and not there")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(yticks=places, ylim=(len(shown) - 0.5, -0.5), xlabel="photos")
    axes.set_yticklabels([short(labels[i], 1.8, 8) for i in shown], fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    _whole_numbers(axes)
    title = f"the {MOST_SHOWN} classes with most mistakes" if len(labels) > MOST_SHOWN else None
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper center", title=title)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _most_confused(report: Report) -> Figure:
    pairs = report.confused[:MOST_SHOWN]
    figure = _figure(WIDTH, 1.0 + 0.3 * max(len(pairs), 2))
    axes = figure.subplots()
    if not pairs:
        axes.text(0.5, 0.5, "no photo was taken for another class", ha="center", color=INK)
        axes.axis("off")
        return figure
    support = {row.label: row.support for row in report.per_class}
    places, counts = range(len(pairs)), [count for _, _, count in pairs]
    axes.barh(places, counts, color=ORANGE, height=0.7)
    for place, (true, _, count) in zip(places, pairs, strict=True):
        axes.text(count, place, f" {count} of {support[true]}", va="center", fontsize=8, color=INK)
    axes.set(
        yticks=places, ylim=(len(pairs) - 0.5, -0.5), xlim=(0, max(counts) * 1.15),
        xlabel="photos",
    )  # fmt: skip
    figure.suptitle("what was taken for what, most often", fontsize=10, color=INK)
    names = [f"{short(true, 1.4, 8)} → {short(said, 1.4, 8)}" for true, said, _ in pairs]
    axes.set_yticklabels(names, fontsize=8)
    _whole_numbers(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _worst(answers: Answers) -> list[int]:
    """Photos that are wrong, those with the greatest loss first."""
    scores, tiny = answers.scores.astype(np.float64), 1e-30
    if answers.photos.multi_label:
        known, true = ~np.isnan(answers.targets), answers.targets == 1
        right = np.where(true, scores, 1 - scores).clip(tiny)
        loss = np.where(known, -np.log(right), 0).sum(axis=1) / known.sum(axis=1).clip(1)
        wrong = (known & (true != answers.said)).any(axis=1)
    else:
        loss = -np.log(scores[np.arange(len(scores)), answers.targets].clip(tiny))
        wrong = answers.said != answers.targets
    order = np.argsort(-loss, kind="stable")
    return [int(index) for index in order[wrong[order]][:MISTAKES]]


def _caption(answers: Answers, index: int, room: float) -> str:
    """The truth, and what was said instead; room: inches a line."""
    labels, said, scores = answers.photos.labels, answers.said[index], answers.scores[index]
    if answers.photos.multi_label:
        truth = answers.targets[index]
        kinds = {"missed": (truth == 1) & ~said, "wrong": (truth == 0) & said}
        lines = [f"is {', '.join(answers.photos.photos[index].labels) or 'none of them'}"]
        for what, which in kinds.items():
            names = ", ".join(f"{labels[i]} {scores[i]:.2f}" for i in np.flatnonzero(which))
            lines += [f"{what} {names}"] * bool(names)
    else:
        lines = [f"is {labels[answers.targets[index]]}", f"said {labels[said]} {scores[said]:.2f}"]
    return "\n".join(short(line, room, CAPTION) for line in lines)


def _figure(width: float, height: float) -> Figure:
    figure = new_figure(width, height)
    figure.set_dpi(DOTS)
    return figure


def _square(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = _figure(WIDTH * 0.85, WIDTH)
    axes = figure.subplots()
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _styled(curves: Sequence[Curve]) -> Iterator[tuple[Curve, dict[str, Any]]]:
    """All together in ink, the classes in colours."""
    for index, curve in enumerate(curves):
        colour = COLOURS[(index - 1) % len(COLOURS)] if index else INK
        yield curve, {"color": colour, "linewidth": 1.4 if index else 2.2}


def _legend(figure: Figure, axes: Axes, what: str, lowest: bool) -> None:
    if axes.get_legend_handles_labels()[0]:
        title = f"{what}: of all together, and the lowest" if lowest else what
        figure.legend(
            frameon=False, fontsize=8, loc="outside lower center", ncols=2, title=title,
            title_fontsize=8,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "undefined: one class alone", ha="center", color=INK)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
