"""What is tuned on validation photos: one temperature, and a threshold for each class.

Shapes: N photos, C classes, M of a class's known scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.metrics import quick
from vitlib.predict.calibration import MOST, Calibration
from vitlib.scores import apply_temperature, scores_to_logits, sigmoid, softmax

Array = npt.NDArray[Any]
FEW = 30  # photos of a class: below, a threshold follows single photos
STEPS = 100  # of the search; about eight are taken


def fit(
    targets: npt.NDArray[Any],
    scores: npt.NDArray[Any],
    labels: Sequence[str],
    multi_label: bool,
    *,
    source: str = "",
    date: str = "",
) -> Calibration:
    """The calibration of scores (N, C) on photos with these targets (as metrics take them), which
    are neither those that the model was trained on nor those it is to be judged by.

    Raises ConfigError as metrics.quick does.
    """
    before = quick(targets, scores, multi_label)["log_loss"]
    best, notes = temperature(targets, scores, multi_label), []
    if best is None:
        notes.append(
            f"the temperature stays 1: on these {len(scores)} photos the log loss has no least "
            f"value between {1 / MOST:g} and {MOST:g}"
        )
    chosen = best or 1.0
    calibrated = apply_temperature(scores, chosen, multi_label)
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
        chosen,
        limits,
        source,
        len(scores),
        tuple(int(count) for count in counts),
        (before, quick(targets, calibrated, multi_label)["log_loss"]),
        tuple(notes),
        date,
    )


def temperature(targets: Array, scores: Array, multi_label: bool) -> float | None:
    """The temperature with the least log loss (Guo et al. 1706.04599, section 4.2).

    targets: (N,) class numbers or (N, C) of 1, 0 and NaN; scores: (N, C). None where the loss has
    no least value between 1 / MOST and MOST: a set of which all photos are right, with room to
    spare, wants ever sharper scores, and one answered by chance ever flatter ones.
    """
    z = scores_to_logits(scores, multi_label)
    if multi_label:
        known = ~np.isnan(targets)
        own, z = targets[known], z[known]
        return _least(lambda beta: _sigmoid_slope(beta, z, own))
    right = z[np.arange(len(z)), targets]
    return _least(lambda beta: _softmax_slope(beta, z, right))


def thresholds(targets: Array, scores: Array) -> npt.NDArray[np.float64]:
    """(N, C) of 1, 0 and NaN, and scores (N, C) -> (C,) thresholds with the greatest F1 of each
    class; 0.5 where no photo is known to have it."""
    found = np.full(scores.shape[1], 0.5)
    for index, (has, sure) in enumerate(zip(targets.T, scores.T, strict=True)):
        known = ~np.isnan(has)
        if (has == 1).any():
            found[index] = threshold(has[known] == 1, sure[known])
    return found


def threshold(has: Array, sure: Array) -> float:
    """Of one class: whether each photo has it (M,), and its scores (M,), at least one of them had.

    F1 changes only at scores: of the stretches between two scores where it is greatest, the one
    nearest to 0.5 is taken, and in it 0.5 itself or, where it does not hold it, the middle.
    """
    order = np.argsort(-sure, kind="stable")
    values = sure[order].astype(np.float64)
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # of equal scores the last
    right = np.cumsum(has[order])[ends]
    f1 = 2 * right / (ends + 1 + has.sum())
    upper = values[ends]
    lower = np.append(upper[1:], 0.0)
    best = f1 == f1.max()
    middle = (upper + lower) / 2
    middle[(lower < 0.5) & (upper >= 0.5)] = 0.5
    return float(min(middle[best], key=lambda value: abs(value - 0.5)))


def _least(slope: Callable[[float], tuple[float, float]]) -> float | None:
    """Where a convex loss of beta = 1 / temperature is least: Newton's steps, kept between bounds.

    slope: beta -> the first and second derivative.
    """
    low, high, beta = 1 / MOST, MOST, 1.0
    if slope(low)[0] >= 0 or slope(high)[0] <= 0:
        return None
    for _ in range(STEPS):
        first, second = slope(beta)
        low, high = (beta, high) if first < 0 else (low, beta)
        step = beta - first / second if second > 0 else math.inf
        new = step if low < step < high else math.sqrt(low * high)
        if abs(new - beta) <= 1e-10 * beta:
            break
        beta = new
    return 1 / beta


def _softmax_slope(beta: float, z: Array, right: Array) -> tuple[float, float]:
    p = softmax(beta * z)
    mean = (p * z).sum(axis=1)
    spread = (p * z * z).sum(axis=1) - mean**2
    return float((mean - right).mean()), float(spread.mean())


def _sigmoid_slope(beta: float, z: Array, own: Array) -> tuple[float, float]:
    p = sigmoid(beta * z)
    return float(((p - own) * z).mean()), float((p * (1 - p) * z * z).mean())
