"""The metrics that are sums over photos, in numpy alone.

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
    """Scores in bins of equal width: how sure the model was, and how often it was right."""

    counts: npt.NDArray[np.int64]  # (bins,)
    confidence: npt.NDArray[np.float64]  # (bins,) mean score; NaN in an empty bin
    accuracy: npt.NDArray[np.float64]  # (bins,) share that was right; NaN in an empty bin

    @property
    def error(self) -> float:
        """The expected calibration error, 0..1: Guo et al. 1706.04599, equation 3."""
        gap = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((self.counts * gap).sum() / max(self.counts.sum(), 1))


@dataclass(frozen=True)
class PerPhoto:
    """What quick() sums: each photo's part, so that intervals can draw photos again and again."""

    num_classes: int
    single: tuple[Array, Array] | None  # targets and answers, (N,) each
    several: tuple[Floats, Floats, Floats] | None  # right, said, true: (N, C) of 0 and 1 each
    columns: dict[str, Floats] = field(default_factory=dict)  # (N,) each, whose means are metrics
    pairs: Floats | None = None  # (N,) known classes, the weights of log_loss

    def __len__(self) -> int:
        return len(self.columns["accuracy"])


def quick(
    targets: Array, scores: Floats, multi_label: bool, threshold: float | Floats = 0.5
) -> dict[str, float]:
    """The metrics that need no ranking of photos, in numpy alone.

    accuracy, balanced_accuracy, f1_, precision_ and recall_score_{micro,macro,weighted}, log_loss;
    of one label a photo top_5_accuracy where there are more classes than 5; of several iou,
    iou_{micro,macro,weighted}. threshold: of several labels, one or (C,).

    Raises ConfigError for shapes that do not fit, no photo, or scores that are no probabilities.
    """
    return summary(per_photo(targets, scores, multi_label, threshold))


def checked(
    targets: Array, scores: Floats, multi_label: bool, threshold: float | Floats = 0.5
) -> tuple[Array, Floats, Floats]:
    """Targets, scores and thresholds (C,), of shapes that fit. Raises ConfigError else."""
    targets, scores = np.asarray(targets), np.asarray(scores)
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating) or not scores.size:
        raise ConfigError(f"scores {scores.shape} {scores.dtype}: expected (N, C) floats, N, C > 0")
    if scores.shape[1] == 1 and not multi_label:
        raise ConfigError("one class and one label a photo: expected two classes or more")
    wanted = scores.shape if multi_label else scores.shape[:1]
    if targets.shape != wanted:
        raise ConfigError(f"targets {targets.shape} for scores {scores.shape}: expected {wanted}")
    bad = ~((scores >= 0) & (scores <= 1)).all(axis=1)
    if bad.any():
        raise ConfigError(
            f"{bad.sum()} of {len(scores)} rows of scores are no probabilities, the first at "
            f"{bad.argmax()}: expected all in 0..1"
        )
    if multi_label and not (np.isnan(targets) | (targets == 0) | (targets == 1)).all():
        raise ConfigError("targets with several labels a photo: expected 0, 1, or NaN for unknown")
    if multi_label and np.isnan(targets).all():
        raise ConfigError("no target is known: expected at least one 0 or 1")
    if not multi_label and not np.isin(targets, np.arange(scores.shape[1])).all():
        raise ConfigError(f"targets beyond the {scores.shape[1]} classes: expected 0 to C - 1")
    limits = np.broadcast_to(np.asarray(threshold, np.float64), scores.shape[1:])
    return targets if multi_label else targets.astype(np.int64), scores, limits


def per_photo(
    targets: Array, scores: Floats, multi_label: bool, threshold: float | Floats = 0.5
) -> PerPhoto:
    """What each photo adds to quick(); errors are quick()'s."""
    targets, scores, limits = checked(targets, scores, multi_label, threshold)
    classes, tiny = scores.shape[1], np.finfo(scores.dtype).eps
    if not multi_label:
        answers, own = scores.argmax(axis=1), scores[np.arange(len(scores)), targets]
        columns = {"accuracy": (answers == targets).astype(np.float64)}
        if classes > TOP:
            # Of equal scores the later class comes first, as in scikit-learn's top_k_accuracy.
            later = np.arange(classes) > targets[:, None]
            before = (scores > own[:, None]) | ((scores == own[:, None]) & later)
            columns["top_5_accuracy"] = (before.sum(axis=1) < TOP).astype(np.float64)
        columns["log_loss"] = -np.log(own.clip(tiny, 1 - tiny), dtype=np.float64)
        return PerPhoto(classes, (targets, answers), None, columns)
    kept = ~np.isnan(targets).all(axis=1)
    targets, scores = targets[kept], scores[kept]
    known = ~np.isnan(targets)
    # What is unknown is neither true nor said: these metrics do not count such pairs.
    true, said = targets == 1, known & (scores >= limits)
    union = (true | said).sum(axis=1)
    right = np.where(true, scores, 1 - scores).clip(tiny, 1 - tiny)
    losses = np.where(known, -np.log(right, dtype=np.float64), 0.0).sum(axis=1)
    columns = {
        "accuracy": (true == said).all(axis=1).astype(np.float64),
        "iou": _over((true & said).sum(axis=1), union),
        "log_loss": losses / known.sum(axis=1),
    }
    parts = [x.astype(np.float32) for x in (true & said, said, true)]
    pairs = known.sum(axis=1).astype(np.float64)
    return PerPhoto(classes, None, (parts[0], parts[1], parts[2]), columns, pairs)


def summary(rows: PerPhoto, weights: Floats | None = None) -> dict[str, float]:
    """The metrics of quick(); weights: (N,) how often each photo counts, once where None."""
    many = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    found = {name: float(np.average(column, weights=many)) for name, column in rows.columns.items()}
    if rows.single is not None:
        targets, answers = rows.single
        hits = targets == answers
        of = ((targets[hits], many[hits]), (answers, many), (targets, many))
        sums = [np.bincount(x, w, rows.num_classes) for x, w in of]
        return found | _averages(sums[0], sums[1], sums[2], counted=sums[1] + sums[2] > 0)
    assert rows.several is not None
    assert rows.pairs is not None
    found["log_loss"] = float(np.average(rows.columns["log_loss"], weights=many * rows.pairs))
    whole = many.astype(np.float32)  # numbers, whose sums are exact
    right, said, true = (np.asarray(whole @ x, np.float64) for x in rows.several)
    found |= _averages(right, said, true, counted=np.ones(rows.num_classes, bool))
    iou = _over(right, said + true - right)
    found["iou_micro"] = float(_over(right.sum(), (said + true - right).sum()))
    found["iou_macro"] = float(iou.mean())
    found["iou_weighted"] = float(_over(iou @ true, true.sum()))
    return found


def reliability(confidence: Floats, right: Array, bins: int = BINS) -> Reliability:
    """Scores (M,) 0..1 and whether each was right (M,) -> bins ((m - 1) / bins, m / bins]."""
    sure = np.asarray(confidence, np.float64)
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    place = np.searchsorted(edges, sure, side="left")
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        sums = (np.bincount(place, x, bins) for x in (sure, np.asarray(right, np.float64)))
        mean, share = (x / counts for x in sums)
    return Reliability(counts, mean, share)


def confidences(targets: Array, scores: Floats, multi_label: bool) -> tuple[Floats, Array]:
    """Of one label the greatest score of each photo and whether it was right, (N,); of several
    every known score and whether the photo has the class, (M,)."""
    if multi_label:
        known = ~np.isnan(targets)
        return scores[known], targets[known] == 1
    return scores.max(axis=1), scores.argmax(axis=1) == targets


def _averages(right: Floats, said: Floats, true: Floats, counted: Array) -> dict[str, float]:
    """Counts a class (C,) -> f1, precision and recall, averaged over the classes counted."""
    found = {}
    ratios = {"f1": (2 * right, said + true), "precision": (right, said), "recall": (right, true)}
    for name, (part, whole) in ratios.items():
        each = _over(part, whole)[counted]
        found[f"{name}_score_micro"] = float(_over(part.sum(), whole.sum()))
        found[f"{name}_score_macro"] = float(each.mean())
        found[f"{name}_score_weighted"] = float(_over(each @ true[counted], true.sum()))
    return found | {"balanced_accuracy": found["recall_score_macro"]}


def _over(part: Any, whole: Any) -> Floats:
    """part / whole, 0 where there is nothing to divide by."""
    below = np.asarray(whole, np.float64)
    found: Floats = np.divide(part, below, out=np.zeros(below.shape), where=below > 0)
    return found
