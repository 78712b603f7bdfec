"""Logistic regression by DINOv2's protocol: raw features, an L2 penalty, C chosen on other photos.

The path of C is searched from the strongest penalty on, on a coarse grid and then around its best
point. Of many photos each fit of the search starts from the last one and computes in float32. The
final fit is in float64 (Oquab et al. 2304.07193, section 7.1, and the code published with it).

Shapes: N photos, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vitlib.errors import ConfigError, DataError
from vitlib.metrics import per_photo
from vitlib.probe.solver import Solver, choose_threads
from vitlib.scores import sigmoid, softmax

Array = npt.NDArray[Any]
PENALTIES = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))  # C: smaller ones are stronger
STEP = 4  # of the coarse grid, a factor of 10
PATIENCE = 2  # points of the coarse grid without a better one, after which the path ends
FEW, FOLDS, HELD_OUT = 2000, 5, 0.1  # below FEW photos folds choose, above it a tenth of them
NEVER = -1e4  # logit of a class without a training photo: its score is 0
DEFAULT_C = 1.0  # of scikit-learn, where photos are too few to choose
MAX_DOUBLE = 2**29  # bytes of features in float64; more are fitted in float32


@dataclass(frozen=True)
class LogisticHead:
    """A linear head fitted by logistic regression.

    Attributes:
        weight: (C, D) float64.
        bias: (C,) float64.
        c: Inverse strength of the penalty.
        multi_label: True if each class is scored alone.
    """

    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]
    c: float
    multi_label: bool

    def logits(self, features: Array) -> npt.NDArray[np.float64]:
        """Compute the logits of photos.

        Args:
            features: (N, D).

        Returns:
            (N, C).
        """
        return np.asarray(features.astype(np.float64) @ self.weight.T + self.bias)

    def scores(self, features: Array) -> npt.NDArray[np.float64]:
        """Compute the score of each class: softmax, or sigmoid with several labels.

        Args:
            features: (N, D).

        Returns:
            (N, C), 0..1.
        """
        logits = self.logits(features)
        return np.asarray(sigmoid(logits) if self.multi_label else softmax(logits))


class Fitter:
    """Fits heads to one set of features.

    Args:
        features: (N, D).
        targets: (N,) class numbers, or (N, C) of 1, 0 and NaN.
        num_classes: C.
        search: True starts each fit from the last solution, stops earlier, and computes in float32
            where photos are many; False starts from zero in float64.
    """

    def __init__(
        self, features: Array, targets: Array, num_classes: int, *, search: bool = False
    ) -> None:
        is_double = 8 * features.size <= MAX_DOUBLE and not (search and len(features) > FEW)
        self.targets, self.num_classes, self.search = targets, num_classes, search
        self.width = features.shape[1]
        if self.multi_label:
            has_both = [
                len(np.unique(column[~np.isnan(column)])) == 2 for column in targets.T
            ]  # the others have nothing to learn
            self.fitted = np.flatnonzero(has_both)
            labels: Array = targets[:, self.fitted]
        else:
            self.fitted, labels = np.unique(targets, return_inverse=True)
            if len(self.fitted) == 2:  # one logit, as in scikit-learn, whose penalty it has
                labels = labels[:, None].astype(np.float64)
        self.solver = None
        if len(self.fitted) > (0 if self.multi_label else 1):
            count = labels.shape[1] if labels.ndim == 2 else len(self.fitted)
            dtype = torch.float64 if is_double else torch.float32
            self.solver = Solver(features, labels, count, dtype)

    @property
    def multi_label(self) -> bool:
        """True if photos may have several labels."""
        return self.targets.ndim == 2

    def fit(self, c: float) -> LogisticHead:
        """Fit a head.

        Args:
            c: Inverse strength of the penalty, above 0.

        Returns:
            The head.
        """
        weight, bias = np.zeros((self.num_classes, self.width)), np.full(self.num_classes, NEVER)
        if self.multi_label:
            bias[np.nanmax(self.targets, axis=0, initial=0) == 1] = -NEVER
        else:
            bias[self.fitted] = 0
        if self.solver is not None:
            coef, intercept = self.solver.solve(c, search=self.search)
            if not self.multi_label and len(self.fitted) == 2:
                coef, intercept = np.r_[-coef, coef] / 2, np.r_[-intercept, intercept] / 2
            weight[self.fitted], bias[self.fitted] = coef, intercept
        return LogisticHead(weight, bias, c, self.multi_label)


class Grade(NamedTuple):
    """Grade of a C on held-out photos: the greater tuple is better.

    Attributes:
        value: Mean of the primary metric.
        minus_log_loss: Minus the mean log loss, which decides between equal values.
    """

    value: float
    minus_log_loss: float


def search_path(
    grade: Callable[[int], Grade], count: int = len(PENALTIES)
) -> tuple[int, dict[int, Grade]]:
    """Find the best point of the path, on a coarse grid and then around its best point.

    Args:
        grade: Grades a point of the path, 0 .. count - 1.
        count: Number of points.

    Returns:
        The best point, of equal ones the first, and the grade of each measured point.
    """
    grades: dict[int, Grade] = {}
    best = 0
    for point in range(0, count, STEP):
        grades[point] = grade(point)
        best = point if grades[point] > grades[best] else best
        # Weak penalties take most of the time. The first points may all answer one class alone.
        if grades[best].value > grades[0].value and point - best >= PATIENCE * STEP:
            break
    for point in range(max(best - STEP + 1, 0), min(best + STEP, count)):
        if point not in grades:
            grades[point] = grade(point)
    top = max(grades.values())
    return min(point for point, value in grades.items() if value == top), grades


def divide(targets: Array, seed: int, count: int | None = None) -> npt.NDArray[np.int64]:
    """Divide training photos into parts, each with its share of every class.

    Args:
        targets: (N,) class numbers, or (N, C) of 1, 0 and NaN.
        seed: Seed of the order within a class.
        count: Number of parts; None takes 5 of few photos, and a tenth (part 0) of many.

    Returns:
        (N,) number of the part of each photo.
    """
    random = np.random.RandomState(seed)
    order = random.permutation(len(targets))
    first = targets if targets.ndim == 1 else np.nan_to_num(targets).argmax(axis=1)
    order = order[np.argsort(first[order], kind="stable")]
    parts = np.empty(len(targets), np.int64)
    if count is None and len(targets) > FEW:
        parts[order] = np.minimum(np.arange(len(targets)) % round(1 / HELD_OUT), 1)
    else:
        parts[order] = np.arange(len(targets)) % min(count or FOLDS, max(len(targets), 1))
    return parts


def measured_parts(parts: npt.NDArray[np.int64], num_photos: int) -> tuple[int, ...]:
    """List the parts that are scored by heads of the others: all, of many photos one.

    Args:
        parts: (N,) number of the part of each photo.
        num_photos: Number of photos that decides.

    Returns:
        Their numbers.
    """
    numbers = tuple(int(part) for part in np.unique(parts))
    return numbers[:1] if num_photos > FEW else numbers


def primary_column(targets: Array, scores: Array, multi_label: bool) -> npt.NDArray[np.float64]:
    """Compute what each photo adds to the primary metric: 1 if correct, or its IoU.

    Args:
        targets: (N,) class numbers, or (N, C) of 1, 0 and NaN.
        scores: (N, C), 0..1.
        multi_label: True if photos may have several labels.

    Returns:
        (N,), 0..1.
    """
    if not multi_label:
        return np.asarray(scores.argmax(axis=1) == targets, np.float64)
    return grade_columns(targets, scores, True)[:, 0]


def grade_columns(targets: Array, scores: Array, multi_label: bool) -> npt.NDArray[np.float64]:
    """Compute what each photo adds to a Grade.

    Args:
        targets: (N,) class numbers, or (N, C) of 1, 0 and NaN.
        scores: (N, C), 0..1.
        multi_label: True if photos may have several labels.

    Returns:
        (N, 2) primary metric and minus the log loss; NaN for a photo without a label.
    """
    labelled = ~np.isnan(targets.reshape(len(targets), -1)).all(axis=1)
    columns = np.full((len(targets), 2), np.nan)
    if labelled.any():
        rows = per_photo(targets[labelled], scores[labelled], multi_label).columns
        columns[labelled, 0] = rows["iou" if multi_label else "accuracy"]
        columns[labelled, 1] = -rows["log_loss"]
    return columns


def choose_c(features: Array, targets: Array, num_classes: int, seed: int = 0) -> float:
    """Choose C on held-out parts of the photos.

    Args:
        features: (N, D).
        targets: (N,) class numbers, or (N, C) of 1, 0 and NaN.
        num_classes: C.
        seed: Seed of the division.

    Returns:
        The C whose heads are best on photos that they were not fitted to, of equal ones the first;
        1 where there are too few photos to hold any out.
    """
    if len(targets) < 2 * FOLDS or (targets.ndim == 1 and np.bincount(targets).max() < 2):
        return DEFAULT_C
    parts = divide(targets, seed)
    measured = measured_parts(parts, len(targets))
    fitters = {
        part: Fitter(features[parts != part], targets[parts != part], num_classes, search=True)
        for part in measured
    }

    def grade(point: int) -> Grade:
        columns = []
        for part, fitter in fitters.items():
            head, rows = fitter.fit(PENALTIES[point]), parts == part
            scores = head.scores(features[rows])
            columns.append(grade_columns(targets[rows], scores, fitter.multi_label))
        return Grade(*np.nanmean(np.concatenate(columns), axis=0).tolist())

    with choose_threads(features.size * num_classes):
        return PENALTIES[search_path(grade)[0]]


def logistic(
    features: Array,
    targets: Array | Sequence[int],
    *,
    c: float | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> LogisticHead:
    """Fit a linear head to raw features by logistic regression, as DINOv2's evaluation does.

    Args:
        features: (N, D), not standardised.
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN, where the fit of a
            class leaves photos of an unknown label out.
        c: Inverse strength of the L2 penalty, scikit-learn's C. None chooses one of 45 values from
            1e-6 to 1e5 on held-out photos, and then fits all of them.
        num_classes: C; None takes the greatest class number, or the width of targets.
        seed: Seed of the division into fitted and held-out photos.

    Returns:
        The head.

    Raises:
        ConfigError: Shapes do not match, or c is not above 0.
        DataError: There is no photo, or a feature is not finite.
    """
    features, targets = np.asarray(features), np.asarray(targets)
    if features.ndim != 2 or len(targets) != len(features):
        raise ConfigError(
            f"features {features.shape} and targets {targets.shape}: expected (N, D), and N targets"
        )
    if c is not None and not c > 0:
        raise ConfigError(f"c={c!r}: expected a number above 0, or None to choose one")
    if not features.size or not np.isfinite(features).all():
        raise DataError(
            f"features {features.shape}: expected one photo or more, and finite numbers"
        )
    if num_classes is None:
        num_classes = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    chosen = choose_c(features, targets, num_classes, seed) if c is None else float(c)
    return Fitter(features, targets, num_classes).fit(chosen)
