"""Tables of counts: the confusion matrix, and the table behind ROC, PR, lift and gain charts.

Shapes: N photos, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.metrics.numpy_backend import Array, Floats, validate

THRESHOLDS = 100  # of an accuracy table


def accuracy_table(
    targets: Array, scores: Floats, labels: Sequence[str], multi_label: bool
) -> dict[str, Any]:
    """Count TP, FP, TN and FN of each class at 100 thresholds and at 100 percentiles of all scores.

    The schema is the one of which Azure's studio draws its charts. A class is predicted where its
    score is at least the threshold.

    Args:
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN.
        scores: (N, C) probabilities, 0..1.
        labels: (C,) names of the classes.
        multi_label: True if a photo may have several labels.

    Returns:
        The table, in types that JSON has.
    """
    ranks = np.linspace(0, 1, THRESHOLDS)
    thresholds = {"probability": ranks, "percentile": np.percentile(scores, 100 * ranks)}
    tables: dict[str, list[Any]] = {name: [] for name in thresholds}
    for index in range(len(labels)):
        column = scores[:, index].astype(np.float64)
        has_class = targets[:, index] if multi_label else (targets == index)
        positives, negatives = (np.sort(column[has_class == value]) for value in (1, 0))
        for name, limits in thresholds.items():
            # In sorted scores, the position of a threshold counts the scores below it.
            fn, tn = (np.searchsorted(x, limits, side="left") for x in (positives, negatives))
            table = np.stack([len(positives) - fn, len(negatives) - tn, tn, fn], axis=1)
            tables[name].append(table.tolist())
    data: dict[str, Any] = {"class_labels": list(labels)}
    data |= {f"{name}_thresholds": limits.tolist() for name, limits in thresholds.items()}
    data |= {f"{name}_tables": table for name, table in tables.items()}
    return {"schema_type": "accuracy_table", "schema_version": "1.0.1", "data": data}


def confusion_matrix(
    targets: Array, scores: Floats, multi_label: bool, threshold: float | Floats = 0.5
) -> npt.NDArray[np.int64]:
    """Count predictions by true class.

    Args:
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN.
        scores: (N, C) probabilities, 0..1.
        multi_label: True if a photo may have several labels.
        threshold: with several labels, the least score of a predicted class; one number or (C,).

    Returns:
        With one label (C, C), a row a true class, a column a predicted class. With several
        (C, 2, 2), [[TN, FP], [FN, TP]] of each class over the photos labelled for it.

    Raises:
        ConfigError: as `quick` does.
    """
    targets, scores, limits = validate(targets, scores, multi_label, threshold)
    num_classes = scores.shape[1]
    if not multi_label:
        pairs = targets * num_classes + scores.argmax(axis=1)
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    predicted, counts = scores >= limits, []
    for truth in (0, 1):
        counts += [
            ((targets == truth) & (predicted == answer)).sum(axis=0) for answer in (False, True)
        ]
    return np.stack(counts, axis=1).reshape(num_classes, 2, 2)
