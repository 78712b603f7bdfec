"""The worst predictions of a report: their photos, their files' names and what is wrong.

Shapes: N photos, C classes or outputs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.errors import VitlibError
from vitlib.evaluate.report import Predictions
from vitlib.image.processor import ImageProcessor
from vitlib.plots import contact_sheet
from vitlib.plots.draw import decode_upright

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_MISTAKES = 12
SHEET_DPI = 150  # sharp on a dense screen
THUMBNAIL = 360  # pixels of the longer side


class Mistake(NamedTuple):
    """A wrong prediction.

    Attributes:
        path: Path of the photo.
        name: Path from the folder that has all photos.
        lines: True and predicted labels or numbers, a line each.
    """

    path: Path
    name: str
    lines: tuple[str, ...]


def list_mistakes(predictions: Predictions) -> list[Mistake]:
    """List the wrong predictions with the greatest loss, the worst first.

    For a regression these are the greatest errors, in standard deviations of the output.

    Args:
        predictions: of the photos that can be read.

    Returns:
        At most 12; empty where every prediction is correct.
    """
    regression = predictions.photos.regression
    worst = _greatest_errors(predictions) if regression else _greatest_losses(predictions)
    describe = _describe_numbers if regression else _describe_labels
    paths = [photo.path for photo in predictions.photos.photos]
    try:
        folder = os.path.commonpath([path.parent for path in paths]) if worst else ""
    except ValueError:  # some paths are absolute, and some are not
        folder = os.curdir
    return [
        Mistake(paths[i], os.path.relpath(paths[i], folder or os.curdir), describe(predictions, i))
        for i in worst
    ]


def draw_mistakes(
    mistakes: Sequence[Mistake], processor: ImageProcessor | None = None
) -> Figure | None:
    """Draw photos in rows of four, each above its file's name and its lines.

    Args:
        mistakes: as `list_mistakes` gives them.
        processor: preprocessing that says how images deeper than 8 bits are shown.

    Returns:
        The figure, or None without mistakes.
    """
    if not mistakes:
        return None
    figure = contact_sheet(
        [mistake.path for mistake in mistakes],
        ["\n".join(mistake.lines) for mistake in mistakes],
        processor=processor,
        errors={},
        names=[mistake.name for mistake in mistakes],
    )
    figure.set_dpi(SHEET_DPI)
    return figure


def encode_thumbnail(path: Path, processor: ImageProcessor | None = None) -> bytes | None:
    """Encode a small copy of a photo as JPEG.

    Args:
        path: The photo.
        processor: preprocessing that says how images deeper than 8 bits are shown.

    Returns:
        The bytes, or None where the photo can no longer be read.
    """
    try:
        small = decode_upright(path, processor)
    except VitlibError:  # the file can change or vanish after it was classified
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "jpeg", quality=85)
    return file.getvalue()


def _greatest_losses(predictions: Predictions) -> list[int]:
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


def _describe_labels(predictions: Predictions, index: int) -> tuple[str, ...]:
    """Name the true and the predicted classes; a long label cannot push out its score."""
    labels, scores = predictions.photos.labels, predictions.scores[index]
    y_pred = predictions.y_pred[index]
    if not predictions.photos.multi_label:
        target = predictions.targets[index]
        return (
            f"true {scores[target]:.2f} {labels[target]}",
            f"predicted {scores[y_pred]:.2f} {labels[y_pred]}",
        )
    truth = predictions.targets[index]
    kinds = {"missed": (truth == 1) & ~y_pred, "wrong": (truth == 0) & y_pred}
    lines = [f"true {', '.join(predictions.photos.photos[index].labels) or 'none'}"]
    for kind, mask in kinds.items():
        names = ", ".join(f"{scores[i]:.2f} {labels[i]}" for i in np.flatnonzero(mask))
        lines += [f"{kind} {names}"] * bool(names)
    return tuple(lines)


def _greatest_errors(predictions: Predictions) -> list[int]:
    """Select the photos with the greatest errors, the worst first."""
    errors = _scaled_errors(predictions).max(axis=1)
    order = np.argsort(-errors, kind="stable")[:MAX_MISTAKES]
    return [int(index) for index in order if errors[index] > 0]


def _scaled_errors(predictions: Predictions) -> npt.NDArray[np.float64]:
    """Compute absolute errors in standard deviations of the output, (N, C)."""
    y_true = predictions.targets.astype(np.float64)
    spread = y_true.std(axis=0)
    return np.asarray(np.abs(predictions.scores - y_true) / np.where(spread > 0, spread, 1))


def _describe_numbers(predictions: Predictions, index: int) -> tuple[str, ...]:
    """Name the output with the greatest error, its true and its predicted number."""
    output = int(_scaled_errors(predictions)[index].argmax())
    y_true, y_pred = predictions.targets[index, output], predictions.scores[index, output]
    return (f"{predictions.photos.labels[output]} {y_true:.5g}", f"predicted {y_pred:.5g}")
