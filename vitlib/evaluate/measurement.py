"""Predictions -> a Report: metrics, intervals, confused classes, and how they were measured."""

from __future__ import annotations

import platform
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import vitlib
from vitlib.data import LabelledPhotos
from vitlib.evaluate import intervals
from vitlib.evaluate.intervals import LEVEL
from vitlib.evaluate.report import Predictions, Report, has_tables
from vitlib.metrics import confidences, every, per_output, per_photo, quick, regression, reliability
from vitlib.predict.calibration import Calibration
from vitlib.predict.predictor import Predictor
from vitlib.vit import ViT

MAX_CONFUSED = 50  # pairs of classes in a report
LIBRARIES = ("torch", "numpy", "scikit-learn", "pillow", "matplotlib")


def measure(
    predictions: Predictions,
    folder: Path,
    calibration: Calibration | None,
    about: dict[str, Any],
    *,
    positive: int | None,
    bootstrap: int,
    seed: int,
) -> Report:
    """Measure the predictions of a classifier.

    Args:
        predictions: of the photos that can be read.
        folder: where the report will be written.
        calibration: the one that made the scores; None for uncalibrated scores.
        about: model, data and versions, as `describe_run` gives them.
        positive: number of a class to measure against the rest; None for no class.
        bootstrap: resamples for the intervals; 0 computes none.
        seed: of the resamples.

    Returns:
        The report.
    """
    multi_label, thresholds = predictions.photos.multi_label, predictions.thresholds
    pair = predictions.targets, predictions.scores
    metrics = every(*pair, predictions.photos.labels, multi_label, thresholds, positive)
    rows = per_photo(*pair, multi_label, thresholds)
    uncalibrated = {}
    if calibration is not None:
        uncalibrated = quick(predictions.targets, predictions.raw_scores, multi_label)
        confidence = confidences(predictions.targets, predictions.raw_scores, multi_label)
        uncalibrated["expected_calibration_error"] = reliability(*confidence).error
    return Report(
        folder=folder,
        multi_label=multi_label,
        metrics=metrics.values,
        intervals=intervals.bootstrap(rows, bootstrap, seed),
        per_class=metrics.per_class,
        thresholds=tuple(map(float, thresholds)) if multi_label else (),
        confused=() if multi_label else _confused_pairs(predictions),
        uncalibrated=uncalibrated,
        calibration=calibration,
        notes=(*_notes(predictions, calibration, about), *metrics.notes),
        about=about | {"bootstrap": {"resamples": bootstrap, "seed": seed, "level": LEVEL}},
    )


def measure_regression(
    predictions: Predictions, folder: Path, about: dict[str, Any], *, bootstrap: int, seed: int
) -> Report:
    """Measure the predictions of a regression.

    Args:
        predictions: of the photos that can be read.
        folder: where the report will be written.
        about: model, data and versions, as `describe_run` gives them.
        bootstrap: resamples for the intervals; 0 computes none.
        seed: of the resamples.

    Returns:
        The report.
    """
    pair = predictions.targets, predictions.scores
    values = regression(*pair)
    notes = _notes(predictions, None, about)
    undefined = [name for name, value in values.items() if np.isnan(value)]
    if undefined:
        notes.append(f"undefined (NaN) with fewer than two photos: {', '.join(undefined)}")
    outputs = per_output(*pair, predictions.photos.labels)
    # 0 is the mean of these photos as the answer to each.
    poor = [row.label for row in outputs if row.r2_score <= 0]
    if poor:
        notes.append(f"no better than the mean as the answer to every photo: {', '.join(poor)}")
    return Report(
        folder=folder,
        multi_label=False,
        metrics=values,
        intervals=intervals.resample_intervals(
            len(predictions.targets), partial(regression, *pair), bootstrap, seed
        ),
        per_class=(),
        thresholds=(),
        confused=(),
        uncalibrated={},
        calibration=None,
        notes=tuple(notes),
        about=about | {"bootstrap": {"resamples": bootstrap, "seed": seed, "level": LEVEL}},
        per_output=outputs,
    )


def describe_run(
    predictor: Predictor, name: str, photos: LabelledPhotos, evaluated: int, date: str
) -> dict[str, Any]:
    """Describe model, photos and library versions.

    Args:
        predictor: the model and its preprocessing.
        name: where the model was loaded from.
        photos: the whole set.
        evaluated: number of photos that can be read.
        date: of the run, ISO 8601.

    Returns:
        The fields date, model, data and versions of metrics.json.
    """
    fast, config = predictor.fast(), predictor.model.config
    failed = len(photos) + len(photos.left_out) - evaluated
    return {
        "date": date,
        "model": {
            "name": name,
            "family": config.family,
            "problem_type": config.problem_type,
            "classes": config.num_classes,
            "precision": _dtype_name(fast) if isinstance(fast, ViT) else fast.precision,
            "device": str(fast.device),
            "preprocessing": predictor.image_processor.to_dict(),
        },
        "data": {
            "source": photos.source,
            "photos": evaluated + failed,
            "evaluated": evaluated,
            "failed": failed,
        },
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str | None]:
    """Return the versions of vitlib, Python and the libraries that compute.

    Returns:
        The version by name; None where a library is not installed.
    """
    return {
        "vitlib": vitlib.__version__,
        "python": platform.python_version(),
        **{library: _version(library) for library in LIBRARIES},
    }


def _confused_pairs(predictions: Predictions) -> tuple[tuple[str, str, int], ...]:
    """Count wrong predictions by (true, predicted), the most frequent pairs first."""
    labels, num_classes = predictions.photos.labels, len(predictions.photos.labels)
    wrong = predictions.y_pred != predictions.targets
    pairs = predictions.targets[wrong] * num_classes + predictions.y_pred[wrong]
    kinds, counts = np.unique(pairs, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_CONFUSED]
    return tuple(
        (labels[kind // num_classes], labels[kind % num_classes], count)
        for kind, count in zip(kinds[order].tolist(), counts[order].tolist(), strict=True)
    )


def _notes(
    predictions: Predictions, calibration: Calibration | None, about: dict[str, Any]
) -> list[str]:
    """Describe failed photos, the calibration and files left out, a sentence each."""
    notes, data = [], about["data"]
    if data["failed"]:
        notes.append(
            f"{data['failed']} of {data['photos']} photos could not be used and are not counted"
        )
    if calibration is not None:
        uses_thresholds = calibration.thresholds == tuple(predictions.thresholds)
        settings = f"temperature {calibration.temperature:.4g}"
        settings += ", a threshold for each class" if uses_thresholds else ""
        notes.append(
            f"the scores are calibrated ({settings}), tuned on {calibration.photos} photos of "
            f"{calibration.source}"
        )
        notes += calibration.notes
    num_classes = len(predictions.photos.labels)
    if not predictions.photos.regression and not has_tables(num_classes):
        notes.append(
            f"accuracy_table.json and confusion_matrix.json are left out: {num_classes} classes "
            "would make them hundreds of megabytes"
        )
    return notes


def _dtype_name(weight: Any) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
