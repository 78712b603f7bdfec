"""How good scores are, as pure functions on arrays: quick() after each epoch, every() in a report.

Scores are probabilities, (N, C), 0..1. Targets are class numbers (N,), or with several labels a
photo (N, C) of 1, 0, and NaN where nothing is known. The names and definitions are scikit-learn's,
as the reports of Azure's catalog use them:

- A photo's class is the one with the greatest score, of equal ones the first. With several labels
  a class is said where its score is at the threshold or over.
- f1, precision and recall with nothing to divide by are 0. Their macro and weighted averages, and
  balanced_accuracy (which is the macro recall), are over the classes that occur among the targets
  or the answers; with several labels over all classes.
- accuracy with several labels: the whole row is right. iou: the mean of each photo's own; 0 where
  a photo has no label and none is said.
- AUC is one class against the rest. Its averages, and those of the average precision, are over the
  classes that have photos; with several labels over those that also lack them somewhere.
- log_loss clips scores to the machine's precision, as scikit-learn does. With several labels it is
  the mean binary cross-entropy over classes and photos.
- weighted_accuracy counts each photo as often as its class has photos. norm_macro_recall is the
  macro recall, 0 for chance (1 / the classes that have photos), 1 for all right.
- expected_calibration_error: 15 equal bins of confidence (Guo et al. 1706.04599, equation 3); with
  several labels over every score.

Of a regression the targets and values are numbers (N, C): errors.py.

What is unknown counts nowhere: neither as right nor as wrong. A photo of which nothing is known is
left out. An undefined value is NaN, and a note says why.

Shapes: N photos, C classes.
"""

from typing import Any

import numpy.typing as npt

from vitlib.metrics.errors import OutputRow, per_output, regression
from vitlib.metrics.numpy_backend import (
    PerPhoto,
    Reliability,
    confidences,
    per_photo,
    quick,
    reliability,
    summary,
)
from vitlib.metrics.sklearn_backend import ClassRow, Metrics, every, named, scikit_learn
from vitlib.metrics.tables import accuracy_table, confusion_matrix
from vitlib.scores import Task

# The metric to look at first, and those of which less is better.
PRIMARY: dict[Task, str] = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "iou",
    "regression": "root_mean_squared_error",
}
LOWER = ("loss", "log_loss", "mean_absolute_error", "root_mean_squared_error")


def of_task(targets: npt.NDArray[Any], scores: npt.NDArray[Any], task: Task) -> dict[str, float]:
    """quick() of classes, regression() of numbers."""
    if task == "regression":
        return regression(targets, scores)
    return quick(targets, scores, task == "multi_label_classification")


__all__ = [
    "LOWER",
    "PRIMARY",
    "ClassRow",
    "Metrics",
    "OutputRow",
    "PerPhoto",
    "Reliability",
    "accuracy_table",
    "confidences",
    "confusion_matrix",
    "every",
    "named",
    "of_task",
    "per_output",
    "per_photo",
    "quick",
    "regression",
    "reliability",
    "scikit_learn",
    "summary",
]
