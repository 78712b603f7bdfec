"""Metrics as pure functions on arrays: `quick` after each epoch, `every` in a report.

Scores are probabilities, (N, C), 0..1. Targets are class numbers (N,), or with several labels a
photo (N, C) of 1, 0, and NaN for unlabelled. Names and definitions are scikit-learn's, as the
reports of Azure's model catalog use them:

- With one label, the predicted class has the greatest score, of equal ones the first. With several,
  a class is predicted where its score is at least the threshold.
- f1, precision and recall are 0 where their divisor is 0. Their macro and weighted averages, and
  balanced_accuracy (the macro recall), are over the classes that occur among the targets or the
  predictions; with several labels over all classes.
- accuracy with several labels: the share of photos whose labels are all correct. iou: the mean over
  photos; 0 where a photo has no label and none is predicted.
- AUC is one class against the rest. Its averages, and those of the average precision, are over the
  classes that have photos; with several labels over those that some photos also lack.
- log_loss clips scores to the machine's precision, as scikit-learn does. With several labels it is
  the mean binary cross-entropy over classes and photos.
- weighted_accuracy counts each photo as often as its class has photos. norm_macro_recall is the
  macro recall scaled to 0 for chance (1 / the classes that have photos) and 1 for all correct.
- expected_calibration_error: 15 equal bins of confidence (Guo et al. 1706.04599, equation 3); with
  several labels over every score.

Targets and values of a regression are numbers (N, C): errors.py.

An unlabelled class counts neither as correct nor as wrong. A photo without labels is left out. An
undefined value is NaN, and a note says why.

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
from vitlib.metrics.sklearn_backend import (
    ClassRow,
    Metrics,
    every,
    import_sklearn_metrics,
    list_names,
)
from vitlib.metrics.tables import accuracy_table, confusion_matrix
from vitlib.scores import Task

#: The metric of each task that chooses the best epoch.
PRIMARY: dict[Task, str] = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "iou",
    "regression": "root_mean_squared_error",
}
#: The metrics of which less is better.
LOWER = ("loss", "log_loss", "mean_absolute_error", "root_mean_squared_error")


def task_metrics(
    targets: npt.NDArray[Any], scores: npt.NDArray[Any], task: Task
) -> dict[str, float]:
    """Compute `quick` of a classifier, `regression` of numbers.

    Args:
        targets: as the function of the task takes them.
        scores: (N, C) probabilities, or the predicted numbers of a regression.
        task: one of the tasks of vitlib.scores.

    Returns:
        The value of each metric by its name.

    Raises:
        ConfigError: as the function of the task does.
    """
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
    "import_sklearn_metrics",
    "list_names",
    "per_output",
    "per_photo",
    "quick",
    "regression",
    "reliability",
    "summary",
    "task_metrics",
]
