"""Tables of counts: the confusion matrix, and what ROC, PR, lift and gain charts are drawn from.

Shapes: N photos, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.metrics.numpy_backend import Array, Floats, checked

THRESHOLDS = 100  # of an accuracy table


def accuracy_table(
    targets: Array, scores: Floats, labels: Sequence[str], multi_label: bool
) -> dict[str, Any]:
    """Of each class against the rest TP, FP, TN, FN at 100 thresholds 0..1 and at 100 percentiles
    of all scores, in the schema that Azure's studio draws its charts from; >= is over a threshold.
    """
    ranks = np.linspace(0, 1, THRESHOLDS)
    at = {"probability": ranks, "percentile": np.percentile(scores, 100 * ranks)}
    tables: dict[str, list[Any]] = {name: [] for name in at}
    for index in range(len(labels)):
        column = scores[:, index].astype(np.float64)
        has = targets[:, index] if multi_label else (targets == index)
        true, false = (np.sort(column[has == value]) for value in (1, 0))
        for name, limits in at.items():
            missed, left = (np.searchsorted(x, limits, side="left") for x in (true, false))
            table = np.stack([len(true) - missed, len(false) - left, left, missed], axis=1)
            tables[name].append(table.tolist())
    data: dict[str, Any] = {"class_labels": list(labels)}
    data |= {f"{name}_thresholds": limits.tolist() for name, limits in at.items()}
    data |= {f"{name}_tables": table for name, table in tables.items()}
    return {"schema_type": "accuracy_table", "schema_version": "1.0.1", "data": data}


def confusion_matrix(
    targets: Array, scores: Floats, multi_label: bool, threshold: float | Floats = 0.5
) -> npt.NDArray[np.int64]:
    """(C, C), a row a true class, a column an answer; of several labels (C, 2, 2), of each class
    [[TN, FP], [FN, TP]] over the photos of which it is known."""
    targets, scores, limits = checked(targets, scores, multi_label, threshold)
    classes = scores.shape[1]
    if not multi_label:
        pairs = targets * classes + scores.argmax(axis=1)
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    said, kinds = scores >= limits, []
    for truth in (0, 1):
        kinds += [((targets == truth) & (said == answer)).sum(axis=0) for answer in (False, True)]
    return np.stack(kinds, axis=1).reshape(classes, 2, 2)
