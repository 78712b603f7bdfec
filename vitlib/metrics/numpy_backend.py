"""Metrics that are sums over photos, in numpy alone.

Shapes: N photos, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError

Floats = npt.NDArray[Any]  # of a float dtype
Array = npt.NDArray[Any]
TOP = 5
BINS = 15  # of confidence: Guo et al. 1706.04599, section 5


class Reliability(NamedTuple):
    """Reliability diagram: confidence and accuracy in bins of equal width.

    Attributes:
        counts: (bins,) scores in each bin.
        confidence: (bins,) mean score, 0..1; NaN in an empty bin.
        accuracy: (bins,) share of correct predictions, 0..1; NaN in an empty bin.
    """

    counts: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al. 1706.04599, equation 3), 0..1."""
        gap = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((self.counts * gap).sum() / max(self.counts.sum(), 1))


@dataclass(frozen=True)
class PerPhoto:
    """Terms that each photo adds to the metrics of `quick`, for resampling photos.

    Attributes:
        num_classes: C.
        single_label: targets and predicted classes, (N,) each; None with several labels a photo.
        multi_label: true positives, predictions and targets, (N, C) of 0 and 1 each; None with
            one label a photo.
        columns: (N,) arrays whose means are metrics, by the metric's name.
        num_labelled: (N,) labelled classes of each photo, the weights of log_loss; None with one
            label a photo.
    """

    num_classes: int
    single_label: tuple[Array, Array] | None
    multi_label: tuple[Floats, Floats, Floats] | None
    columns: dict[str, Floats] = field(default_factory=dict)
    num_labelled: Floats | None = None

    def __len__(self) -> int:
        return len(self.columns["accuracy"])


def quick(
    targets: Array, scores: Floats, multi_label: bool, threshold: float | Floats = 0.5
) -> dict[str, float]:
    """Compute the metrics that need no ranking of photos, in numpy alone.

    They are accuracy, balanced_accuracy, {f1,precision,recall}_score_{micro,macro,weighted} and
    log_loss. With one label a photo and more than 5 classes, top_5_accuracy as well. With several
    labels, iou and iou_{micro,macro,weighted} as well.

    Args:
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN for unlabelled.
        scores: (N, C) probabilities, 0..1.
        multi_label: True if a photo may have several labels.
        threshold: with several labels, the least score of a predicted class; one number or (C,).

    Returns:
        The value of each metric by its name.

    Raises:
        ConfigError: for shapes that do not fit, no photo, or scores outside 0..1.
    """
    return summary(per_photo(targets, scores, multi_label, threshold))


def validate(
    targets: Array, scores: Floats, multi_label: bool, threshold: float | Floats = 0.5
) -> tuple[Array, Floats, Floats]:
    """Check that targets, scores and thresholds fit each other.

    Args:
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN.
        scores: (N, C) probabilities, 0..1.
        multi_label: True if a photo may have several labels.
        threshold: one number or (C,).

    Returns:
        Targets, scores (N, C) and thresholds (C,) as arrays.

    Raises:
        ConfigError: for shapes that do not fit, no photo, or values out of range.
    """
    targets, scores = np.asarray(targets), np.asarray(scores)
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating) or not scores.size:
        raise ConfigError(f"scores {scores.shape} {scores.dtype}: expected (N, C) floats, N, C > 0")
    if scores.shape[1] == 1 and not multi_label:
        raise ConfigError("one class and one label a photo: expected two classes or more")
    expected = scores.shape if multi_label else scores.shape[:1]
    if targets.shape != expected:
        raise ConfigError(f"targets {targets.shape} for scores {scores.shape}: expected {expected}")
    invalid = ~((scores >= 0) & (scores <= 1)).all(axis=1)
    if invalid.any():
        raise ConfigError(
            f"{invalid.sum()} of {len(scores)} rows of scores are not probabilities, the first at "
            f"{invalid.argmax()}: expected values in 0..1"
        )
    if multi_label and not (np.isnan(targets) | (targets == 0) | (targets == 1)).all():
        raise ConfigError("targets with several labels a photo: expected 0, 1, or NaN (unlabelled)")
    if multi_label and np.isnan(targets).all():
        raise ConfigError("no target is labelled: expected at least one 0 or 1")
    if not multi_label and not np.isin(targets, np.arange(scores.shape[1])).all():
        raise ConfigError(f"targets beyond the {scores.shape[1]} classes: expected 0 to C - 1")
    limits = np.broadcast_to(np.asarray(threshold, np.float64), scores.shape[1:])
    return targets if multi_label else targets.astype(np.int64), scores, limits


def per_photo(
    targets: Array, scores: Floats, multi_label: bool, threshold: float | Floats = 0.5
) -> PerPhoto:
    """Compute the terms that each photo adds to the metrics of `quick`.

    Args:
        targets: as for `quick`.
        scores: as for `quick`.
        multi_label: as for `quick`.
        threshold: as for `quick`.

    Returns:
        The terms, of which `summary` makes the metrics.

    Raises:
        ConfigError: as `quick` does.
    """
    targets, scores, limits = validate(targets, scores, multi_label, threshold)
    num_classes, tiny = scores.shape[1], np.finfo(scores.dtype).eps
    if not multi_label:
        y_pred, own = scores.argmax(axis=1), scores[np.arange(len(scores)), targets]
        columns = {"accuracy": (y_pred == targets).astype(np.float64)}
        if num_classes > TOP:
            # Of equal scores the later class comes first, as in scikit-learn's top_k_accuracy.
            later = np.arange(num_classes) > targets[:, None]
            before = (scores > own[:, None]) | ((scores == own[:, None]) & later)
            columns["top_5_accuracy"] = (before.sum(axis=1) < TOP).astype(np.float64)
        columns["log_loss"] = -np.log(own.clip(tiny, 1 - tiny), dtype=np.float64)
        return PerPhoto(num_classes, (targets, y_pred), None, columns)
    has_labels = ~np.isnan(targets).all(axis=1)
    targets, scores = targets[has_labels], scores[has_labels]
    labelled = ~np.isnan(targets)
    # An unlabelled class counts neither as true nor as predicted, so no metric sees it.
    y_true, y_pred = targets == 1, labelled & (scores >= limits)
    union = (y_true | y_pred).sum(axis=1)
    likelihood = np.where(y_true, scores, 1 - scores).clip(tiny, 1 - tiny)
    losses = np.where(labelled, -np.log(likelihood, dtype=np.float64), 0.0).sum(axis=1)
    columns = {
        "accuracy": (y_true == y_pred).all(axis=1).astype(np.float64),
        "iou": _divide((y_true & y_pred).sum(axis=1), union),
        "log_loss": losses / labelled.sum(axis=1),
    }
    parts = [x.astype(np.float32) for x in (y_true & y_pred, y_pred, y_true)]
    num_labelled = labelled.sum(axis=1).astype(np.float64)
    return PerPhoto(num_classes, None, (parts[0], parts[1], parts[2]), columns, num_labelled)


def summary(rows: PerPhoto, weights: Floats | None = None) -> dict[str, float]:
    """Sum the terms of photos to the metrics of `quick`.

    Args:
        rows: the terms of N photos.
        weights: (N,) how often each photo counts; None counts each once.

    Returns:
        The value of each metric by its name.
    """
    counts = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    values = {
        name: float(np.average(column, weights=counts)) for name, column in rows.columns.items()
    }
    if rows.single_label is not None:
        targets, y_pred = rows.single_label
        hits = targets == y_pred
        selections = ((targets[hits], counts[hits]), (y_pred, counts), (targets, counts))
        sums = [np.bincount(x, w, rows.num_classes) for x, w in selections]
        return values | _averages(sums[0], sums[1], sums[2], included=sums[1] + sums[2] > 0)
    assert rows.multi_label is not None
    assert rows.num_labelled is not None
    pair_counts = counts * rows.num_labelled
    values["log_loss"] = float(np.average(rows.columns["log_loss"], weights=pair_counts))
    # Counts are whole numbers below 2**24, so that float32 products of matrices are exact.
    single = counts.astype(np.float32)
    right, predicted, true = (np.asarray(single @ x, np.float64) for x in rows.multi_label)
    values |= _averages(right, predicted, true, included=np.ones(rows.num_classes, bool))
    iou = _divide(right, predicted + true - right)
    values["iou_micro"] = float(_divide(right.sum(), (predicted + true - right).sum()))
    values["iou_macro"] = float(iou.mean())
    values["iou_weighted"] = float(_divide(iou @ true, true.sum()))
    return values


def reliability(confidence: Floats, right: Array, bins: int = BINS) -> Reliability:
    """Count scores and correct predictions in bins ((m - 1) / bins, m / bins].

    Args:
        confidence: (M,) scores, 0..1.
        right: (M,) bool, True where the prediction is correct.
        bins: number of bins of equal width.

    Returns:
        Counts, mean score and accuracy of each bin.
    """
    scores = np.asarray(confidence, np.float64)
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    index = np.searchsorted(edges, scores, side="left")
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        sums = (np.bincount(index, x, bins) for x in (scores, np.asarray(right, np.float64)))
        mean, share = (x / counts for x in sums)
    return Reliability(counts, mean, share)


def confidences(targets: Array, scores: Floats, multi_label: bool) -> tuple[Floats, Array]:
    """Select the scores that a reliability diagram counts.

    Args:
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN.
        scores: (N, C) probabilities, 0..1.
        multi_label: True if a photo may have several labels.

    Returns:
        With one label, the greatest score of each photo and True where it is correct, (N,) each.
        With several, every labelled score and True where the photo has the class, (M,) each.
    """
    if multi_label:
        labelled = ~np.isnan(targets)
        return scores[labelled], targets[labelled] == 1
    return scores.max(axis=1), scores.argmax(axis=1) == targets


def _averages(right: Floats, predicted: Floats, true: Floats, included: Array) -> dict[str, float]:
    """Average f1, precision and recall over the included classes, from counts a class (C,)."""
    values = {}
    ratios = {
        "f1": (2 * right, predicted + true),
        "precision": (right, predicted),
        "recall": (right, true),
    }
    for name, (part, whole) in ratios.items():
        per_class = _divide(part, whole)[included]
        values[f"{name}_score_micro"] = float(_divide(part.sum(), whole.sum()))
        values[f"{name}_score_macro"] = float(per_class.mean())
        values[f"{name}_score_weighted"] = float(_divide(per_class @ true[included], true.sum()))
    return values | {"balanced_accuracy": values["recall_score_macro"]}


def _divide(part: Any, whole: Any) -> Floats:
    """Divide part by whole; 0 where whole is 0, as scikit-learn's zero_division=0."""
    divisor = np.asarray(whole, np.float64)
    ratio: Floats = np.divide(part, divisor, out=np.zeros(divisor.shape), where=divisor > 0)
    return ratio
