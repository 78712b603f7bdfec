"""What an evaluation found, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.data import LabelledPhotos
from vitlib.evaluate.folder import FORMAT, VERSION
from vitlib.metrics import PRIMARY, ClassRow, OutputRow
from vitlib.predict.calibration import TASKS, Calibration
from vitlib.scores import Task

MOST_CLASSES = 2000  # in the tables of counts: with more they would be hundreds of megabytes


def tables_fit(classes: int) -> bool:
    """Whether accuracy_table.json and confusion_matrix.json are written."""
    return classes <= MOST_CLASSES


@dataclass(frozen=True)
class Answers:
    """The photos that could be read, in the classes of the model, and what it says of them."""

    photos: LabelledPhotos
    targets: npt.NDArray[Any]  # as LabelledPhotos.targets()
    scores: npt.NDArray[np.float32]  # (N, C), calibrated where the report is; a regression's values
    raw: npt.NDArray[np.float32]  # (N, C), as the model gives them
    limits: npt.NDArray[np.float64]  # (C,) thresholds; with one label a photo of no meaning

    @property
    def said(self) -> npt.NDArray[Any]:
        """The answers: class numbers (N,), or (N, C) bool."""
        if self.photos.multi_label:
            return np.asarray(self.scores >= self.limits)
        return np.asarray(self.scores.argmax(axis=1))


@dataclass(frozen=True)
class Report:
    """The answer of evaluate(); `as_dict` is metrics.json, and what `--json` prints."""

    folder: Path
    multi_label: bool
    metrics: dict[str, float]  # NaN where undefined; the names are those of vitlib.metrics
    intervals: dict[str, tuple[float, float]]  # of 95 %
    per_class: tuple[ClassRow, ...]
    thresholds: tuple[float, ...]  # that were used, one a class; one label a photo: none
    confused: tuple[tuple[str, str, int], ...]  # (true, said, photos), the most first
    uncalibrated: dict[str, float]  # without the calibration; empty where there is none
    calibration: Calibration | None
    notes: tuple[str, ...]
    about: dict[str, Any]  # model, data, settings, versions, date
    failed: tuple[tuple[str, str], ...] = ()  # (file, why) of photos that count nowhere
    failed_tuning: tuple[tuple[str, str], ...] = ()  # the same of those to tune on
    stored: Path | None = None  # where the calibration was put beside the model
    per_output: tuple[OutputRow, ...] = ()  # of a regression; then there are no classes

    @property
    def task(self) -> Task:
        """What was measured."""
        return "regression" if self.per_output else TASKS[self.multi_label]

    @property
    def primary(self) -> str:
        """The metric to look at first: iou with several labels a photo, root_mean_squared_error of
        a regression, else accuracy."""
        return PRIMARY[self.task]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has: NaN is None."""
        limits = self.thresholds or (None,) * len(self.per_class)
        rows = [
            {**row._asdict(), "threshold": limit}
            for row, limit in zip(self.per_class, limits, strict=True)
        ]
        calibration = self.calibration and self.calibration.as_dict()
        found: dict[str, Any] = {
            "format": FORMAT,
            "format_version": VERSION,
            "complete": True,
            "task": self.task,
            "primary_metric": self.primary,
            **self.about,
            "metrics": self.metrics,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "uncalibrated": self.uncalibrated,
            "calibration": calibration,
            "notes": list(self.notes),
            "per_class": rows,
            "confused": [{"true": a, "said": b, "photos": n} for a, b, n in self.confused],
            "failed": [{"file": file, "error": error} for file, error in self.failed],
            "failed_tuning": [{"file": file, "error": error} for file, error in self.failed_tuning],
        }
        if self.per_output:
            of_classes = ("uncalibrated", "calibration", "per_class", "confused", "failed_tuning")
            found = {key: value for key, value in found.items() if key not in of_classes}
            found["per_output"] = [row._asdict() for row in self.per_output]
        return _plain(found)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """NaN and infinity as None, tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
