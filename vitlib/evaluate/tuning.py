"""Fit one temperature, and a threshold for each class, on validation photos.

Shapes: N photos, C classes, M labelled scores of a class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.metrics import quick
from vitlib.predict.calibration import MAX_TEMPERATURE, Calibration
from vitlib.scores import apply_temperature, scores_to_logits, sigmoid, softmax

Array = npt.NDArray[Any]
FEW = 30  # photos of a class: below, a threshold follows single photos
STEPS = 100  # at most; the search takes about eight


def fit(
    targets: npt.NDArray[Any],
    scores: npt.NDArray[Any],
    labels: Sequence[str],
    multi_label: bool,
    *,
    source: str = "",
    date: str = "",
) -> Calibration:
    """Fit a calibration of scores.

    Fit it on photos that neither train nor judge the model.

    Args:
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN for unlabelled.
        scores: (N, C) probabilities, 0..1.
        labels: (C,) names of the classes.
        multi_label: True if a photo may have several labels.
        source: name of the photos, stored with the calibration.
        date: of the fit, ISO 8601, stored with the calibration.

    Returns:
        The calibration, with notes about what was fitted on few photos or not at all.

    Raises:
        ConfigError: as metrics.quick does.
    """
    before = quick(targets, scores, multi_label)["log_loss"]
    best, notes = temperature(targets, scores, multi_label), []
    if best is None:
        notes.append(
            f"the temperature stays 1: on these {len(scores)} photos the log loss has no least "
            f"value between {1 / MAX_TEMPERATURE:g} and {MAX_TEMPERATURE:g}"
        )
    fitted = best or 1.0
    calibrated = apply_temperature(scores, fitted, multi_label)
    if multi_label:
        counts = (targets == 1).sum(axis=0)
    else:
        counts = np.bincount(targets, minlength=len(labels))
    limits = tuple(map(float, thresholds(targets, calibrated))) if multi_label else None
    few = int((counts < FEW).sum())
    if multi_label and few:
        notes.append(
            f"{few} of {len(labels)} thresholds were chosen on fewer than {FEW} photos that have "
            "the class: 0.5 may do as well"
        )
    return Calibration(
        tuple(labels),
        multi_label,
        fitted,
        limits,
        source,
        len(scores),
        tuple(int(count) for count in counts),
        (before, quick(targets, calibrated, multi_label)["log_loss"]),
        tuple(notes),
        date,
    )


def temperature(targets: Array, scores: Array, multi_label: bool) -> float | None:
    """Find the temperature with the least log loss (Guo et al. 1706.04599, section 4.2).

    Args:
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN.
        scores: (N, C) probabilities, 0..1.
        multi_label: True if a photo may have several labels.

    Returns:
        The temperature, or None where the loss has no minimum between 1 / MAX_TEMPERATURE and
        MAX_TEMPERATURE. Where every photo is correct the loss falls with ever sharper scores, and
        where predictions are random it falls with ever flatter ones.
    """
    z = scores_to_logits(scores, multi_label)
    if multi_label:
        labelled = ~np.isnan(targets)
        y_true, z = targets[labelled], z[labelled]
        return _minimize(lambda beta: _sigmoid_slope(beta, z, y_true))
    right = z[np.arange(len(z)), targets]
    return _minimize(lambda beta: _softmax_slope(beta, z, right))


def thresholds(targets: Array, scores: Array) -> npt.NDArray[np.float64]:
    """Find the threshold of each class with the greatest F1.

    Args:
        targets: (N, C) of 1, 0 and NaN for unlabelled.
        scores: (N, C) probabilities, 0..1.

    Returns:
        (C,) thresholds; 0.5 for a class that no photo has.
    """
    best = np.full(scores.shape[1], 0.5)
    for index, (has_class, confidence) in enumerate(zip(targets.T, scores.T, strict=True)):
        labelled = ~np.isnan(has_class)
        if (has_class == 1).any():
            best[index] = threshold(has_class[labelled] == 1, confidence[labelled])
    return best


def threshold(has_class: Array, scores: Array) -> float:
    """Find the threshold of one class with the greatest F1.

    F1 changes only at scores. Of the intervals between two scores where it is greatest, the nearest
    to 0.5 is taken, and in it 0.5 itself where the interval contains it, else the middle.

    Args:
        has_class: (M,) bool, True where the photo has the class; at least one.
        scores: (M,) probabilities of the class, 0..1.

    Returns:
        The threshold, 0..1.
    """
    order = np.argsort(-scores, kind="stable")
    values = scores[order].astype(np.float64)
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # of equal scores the last
    right = np.cumsum(has_class[order])[ends]
    f1 = 2 * right / (ends + 1 + has_class.sum())
    upper = values[ends]
    lower = np.append(upper[1:], 0.0)
    best = f1 == f1.max()
    middle = (upper + lower) / 2
    middle[(lower < 0.5) & (upper >= 0.5)] = 0.5
    return float(min(middle[best], key=lambda value: abs(value - 0.5)))


def _minimize(slope: Callable[[float], tuple[float, float]]) -> float | None:
    """Minimise a convex loss of beta = 1 / temperature by Newton's method with bisection.

    slope: beta -> the first and second derivative. Returns the temperature, or None where the
    minimum is not between 1 / MAX_TEMPERATURE and MAX_TEMPERATURE.
    """
    low, high, beta = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE, 1.0
    if slope(low)[0] >= 0 or slope(high)[0] <= 0:
        return None
    for _ in range(STEPS):
        first, second = slope(beta)
        low, high = (beta, high) if first < 0 else (low, beta)
        step = beta - first / second if second > 0 else math.inf
        # Far from the minimum a Newton step can leave the bracket; halving on a log scale cannot.
        new = step if low < step < high else math.sqrt(low * high)
        if abs(new - beta) <= 1e-10 * beta:
            break
        beta = new
    return 1 / beta


def _softmax_slope(beta: float, z: Array, right: Array) -> tuple[float, float]:
    """Differentiate the cross-entropy of softmax(beta * z); right: (N,) logits of the targets."""
    p = softmax(beta * z)
    mean = (p * z).sum(axis=1)
    spread = (p * z * z).sum(axis=1) - mean**2
    return float((mean - right).mean()), float(spread.mean())


def _sigmoid_slope(beta: float, z: Array, y_true: Array) -> tuple[float, float]:
    """Differentiate the binary cross-entropy of sigmoid(beta * z); y_true: (M,) of 0 and 1."""
    p = sigmoid(beta * z)
    return float(((p - y_true) * z).mean()), float((p * (1 - p) * z * z).mean())
