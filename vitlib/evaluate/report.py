"""Report: the result of an evaluation, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.data import LabelledPhotos
from vitlib.evaluate.folder import EVALUATION
from vitlib.metrics import PRIMARY, ClassRow, OutputRow
from vitlib.predict.calibration import TASKS, Calibration
from vitlib.scores import Task

MOST_CLASSES = 2000  # in the tables of counts: with more they would be hundreds of megabytes


def has_tables(num_classes: int) -> bool:
    """Return True if accuracy_table.json and confusion_matrix.json are written.

    Args:
        num_classes: of the model.

    Returns:
        False for so many classes that the tables would take hundreds of megabytes.
    """
    return num_classes <= MOST_CLASSES


@dataclass(frozen=True)
class Predictions:
    """Targets and scores of the photos that can be read, in the classes of the model.

    Attributes:
        photos: the photos that can be read.
        targets: as LabelledPhotos.targets() gives them.
        scores: (N, C) probabilities, calibrated where the report is; numbers of a regression.
        raw_scores: (N, C), as the model gives them.
        thresholds: (C,); without meaning where a photo has one label.
    """

    photos: LabelledPhotos
    targets: npt.NDArray[Any]
    scores: npt.NDArray[np.float32]
    raw_scores: npt.NDArray[np.float32]
    thresholds: npt.NDArray[np.float64]

    @property
    def y_pred(self) -> npt.NDArray[Any]:
        """The predicted classes: numbers (N,), or with several labels (N, C) bool."""
        if self.photos.multi_label:
            return np.asarray(self.scores >= self.thresholds)
        return np.asarray(self.scores.argmax(axis=1))


@dataclass(frozen=True)
class Report:
    """Result of `evaluate`; `as_dict` is metrics.json, and the output of `--json`.

    Attributes:
        folder: folder of the report's files.
        multi_label: True if a photo may have several labels.
        metrics: values by the names of vitlib.metrics; NaN where undefined.
        intervals: 95 % interval (low, high) by the metric's name.
        per_class: a row for each class; empty of a regression.
        thresholds: the thresholds in use, one a class; empty where a photo has one label.
        confused: (true, predicted, photos), the most frequent first.
        uncalibrated: metrics without the calibration; empty where there is none.
        calibration: the calibration of the scores, or None.
        notes: sentences about undefined values and photos left out.
        about: model, data, settings, versions, date.
        failed: (file, error) of photos that are not counted.
        failed_tuning: (file, error) of photos of the tuning set that are not counted.
        stored: where the calibration was written beside the model, or None.
        per_output: a row for each output of a regression; empty of a classifier.
    """

    folder: Path
    multi_label: bool
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_class: tuple[ClassRow, ...]
    thresholds: tuple[float, ...]
    confused: tuple[tuple[str, str, int], ...]
    uncalibrated: dict[str, float]
    calibration: Calibration | None
    notes: tuple[str, ...]
    about: dict[str, Any]
    failed: tuple[tuple[str, str], ...] = ()
    failed_tuning: tuple[tuple[str, str], ...] = ()
    stored: Path | None = None
    per_output: tuple[OutputRow, ...] = ()

    @property
    def task(self) -> Task:
        """The task of the model that was measured."""
        return "regression" if self.per_output else TASKS[self.multi_label]

    @property
    def primary(self) -> str:
        """Name of the metric to read first.

        accuracy; iou with several labels a photo; root_mean_squared_error of a regression.
        """
        return PRIMARY[self.task]

    def as_dict(self) -> dict[str, Any]:
        """Convert to types that JSON has.

        Returns:
            Every field; None for NaN.
        """
        limits = self.thresholds or (None,) * len(self.per_class)
        rows = [
            {**row._asdict(), "threshold": limit}
            for row, limit in zip(self.per_class, limits, strict=True)
        ]
        fields: dict[str, Any] = {
            "format": EVALUATION.format,
            "format_version": EVALUATION.version,
            "complete": True,
            "task": self.task,
            "primary_metric": self.primary,
            **self.about,
            "metrics": self.metrics,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "uncalibrated": self.uncalibrated,
            "calibration": self.calibration and self.calibration.as_dict(),
            "notes": list(self.notes),
            "per_class": rows,
            "confused": [
                {"true": true, "predicted": predicted, "photos": count}
                for true, predicted, count in self.confused
            ],
            "failed": [{"file": file, "error": error} for file, error in self.failed],
            "failed_tuning": [{"file": file, "error": error} for file, error in self.failed_tuning],
        }
        if self.per_output:
            for key in ("uncalibrated", "calibration", "per_class", "confused", "failed_tuning"):
                del fields[key]
            fields["per_output"] = [row._asdict() for row in self.per_output]
        return {key: _to_json(value) for key, value in fields.items()}


def _to_json(value: Any) -> Any:
    """Convert NaN and infinity to None, and tuples to lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(inner) for inner in value]
    return value
