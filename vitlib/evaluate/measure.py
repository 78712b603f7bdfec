"""Answers -> numbers: metrics, intervals, what was confused, and what was measured how."""

from __future__ import annotations

import platform
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import vitlib
from vitlib.data import LabelledPhotos
from vitlib.evaluate.intervals import LEVEL, drawn_intervals
from vitlib.evaluate.intervals import bootstrap as intervals_of
from vitlib.evaluate.report import Answers, Report, tables_fit
from vitlib.fast import FastViT
from vitlib.metrics import confidences, every, per_output, per_photo, quick, regression, reliability
from vitlib.predict.calibration import Calibration
from vitlib.predict.predictor import Predictor

MOST_CONFUSED = 50  # pairs that are kept
LIBRARIES = ("torch", "numpy", "scikit-learn", "pillow", "matplotlib")


def measured(
    answers: Answers,
    folder: Path,
    calibration: Calibration | None,
    about: dict[str, Any],
    *,
    positive: int | None,
    bootstrap: int,
    seed: int,
) -> Report:
    """The report of answers; positive: the number of a class to measure against the rest."""
    several, limits = answers.photos.multi_label, answers.limits
    args = answers.targets, answers.scores
    found = every(*args, answers.photos.labels, several, limits, positive)
    rows = per_photo(*args, several, limits)
    uncalibrated = {}
    if calibration is not None:
        uncalibrated = quick(answers.targets, answers.raw, several)
        sure = confidences(answers.targets, answers.raw, several)
        uncalibrated["expected_calibration_error"] = reliability(*sure).error
    return Report(
        folder=folder,
        multi_label=several,
        metrics=found.values,
        intervals=intervals_of(rows, bootstrap, seed),
        per_class=found.per_class,
        thresholds=tuple(map(float, limits)) if several else (),
        confused=() if several else _confused(answers),
        uncalibrated=uncalibrated,
        calibration=calibration,
        notes=(*_notes(answers, calibration, about), *found.notes),
        about=about | {"bootstrap": {"resamples": bootstrap, "seed": seed, "level": LEVEL}},
    )


def measured_numbers(
    answers: Answers, folder: Path, about: dict[str, Any], *, bootstrap: int, seed: int
) -> Report:
    """The report of a regression's answers."""
    pair = answers.targets, answers.scores
    values = regression(*pair)
    notes = _notes(answers, None, about)
    undefined = [name for name, value in values.items() if np.isnan(value)]
    if undefined:
        notes.append(f"undefined (NaN), as it takes two photos: {', '.join(undefined)}")
    return Report(
        folder=folder,
        multi_label=False,
        metrics=values,
        intervals=drawn_intervals(
            len(answers.targets), partial(regression, *pair), bootstrap, seed
        ),
        per_class=(),
        thresholds=(),
        confused=(),
        uncalibrated={},
        calibration=None,
        notes=tuple(notes),
        about=about | {"bootstrap": {"resamples": bootstrap, "seed": seed, "level": LEVEL}},
        per_output=per_output(*pair, answers.photos.labels),
    )


def about(
    predictor: Predictor, name: str, photos: LabelledPhotos, evaluated: int, date: str
) -> dict[str, Any]:
    """Which model, which photos, which versions."""
    fast, config = predictor.fast(), predictor.model.config
    weight = None if isinstance(fast, FastViT) else next(fast.parameters())
    lost = len(photos) + len(photos.left_out) - evaluated
    return {
        "date": date,
        "model": {
            "name": name,
            "family": config.family,
            "problem_type": config.problem_type,
            "classes": config.num_classes,
            "precision": fast.precision if weight is None else _dtype(weight),
            "device": str(fast.device if weight is None else weight.device),
            "preprocessing": predictor.image_processor.to_dict(),
        },
        "data": {
            "source": photos.source,
            "photos": evaluated + lost,
            "evaluated": evaluated,
            "failed": lost,
        },
        "versions": {
            "vitlib": vitlib.__version__,
            "python": platform.python_version(),
            **{library: _version(library) for library in LIBRARIES},
        },
    }


def _confused(answers: Answers) -> tuple[tuple[str, str, int], ...]:
    labels, classes = answers.photos.labels, len(answers.photos.labels)
    wrong = answers.said != answers.targets
    pairs = answers.targets[wrong] * classes + answers.said[wrong]
    kinds, counts = np.unique(pairs, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:MOST_CONFUSED]
    return tuple(
        (labels[kind // classes], labels[kind % classes], count)
        for kind, count in zip(kinds[most].tolist(), counts[most].tolist(), strict=True)
    )


def _notes(answers: Answers, calibration: Calibration | None, about: dict[str, Any]) -> list[str]:
    notes, data = [], about["data"]
    if data["failed"]:
        notes.append(
            f"{data['failed']} of {data['photos']} photos could not be used and count nowhere"
        )
    if calibration is not None:
        used = calibration.thresholds == tuple(answers.limits)
        what = f"temperature {calibration.temperature:.4g}"
        what += ", a threshold for each class" if used else ""
        notes.append(
            f"the scores are calibrated ({what}), tuned on {calibration.photos} photos of "
            f"{calibration.source}"
        )
        notes += calibration.notes
    if not answers.photos.regression and not tables_fit(len(answers.photos.labels)):
        notes.append(
            f"accuracy_table.json and confusion_matrix.json are left out: "
            f"{len(answers.photos.labels)} classes would make them hundreds of megabytes"
        )
    return notes


def _dtype(weight: Any) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
