"""Errors of a regression.

Shapes: N photos, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vitlib.errors import ConfigError
from vitlib.metrics.numpy_backend import Array, Floats


class OutputRow(NamedTuple):
    """Errors of one output, in its own unit.

    Attributes:
        label: name of the output.
        mean_absolute_error: at least 0.
        root_mean_squared_error: at least 0.
        r2_score: at most 1; NaN of one photo.
        mean: of the targets.
        std: of the targets.
        minimum: of the targets.
        maximum: of the targets.
    """

    label: str
    mean_absolute_error: float
    root_mean_squared_error: float
    r2_score: float
    mean: float
    std: float
    minimum: float
    maximum: float


def regression(targets: Array, values: Array, weights: Floats | None = None) -> dict[str, float]:
    """Compute the errors of numbers, averaged over outputs.

    Each metric is the mean over the outputs, as scikit-learn's multioutput="uniform_average".

    Args:
        targets: (N, C) true numbers.
        values: (N, C) predicted numbers.
        weights: (N,) how often each photo counts; None counts each once.

    Returns:
        mean_absolute_error, root_mean_squared_error and r2_score. r2_score is 1 where every number
        is exact, else 0 where the targets are all equal, and NaN of one photo.

    Raises:
        ConfigError: for shapes that do not fit, no photo, or numbers that are not finite.
    """
    columns = _errors_per_output(targets, values, weights)
    return {name: float(column.mean()) for name, column in columns.items()}


def per_output(targets: Array, values: Array, labels: Sequence[str]) -> tuple[OutputRow, ...]:
    """Compute a row for each output.

    Args:
        targets: (N, C) true numbers.
        values: (N, C) predicted numbers.
        labels: (C,) names of the outputs.

    Returns:
        The rows, in the order of the labels.

    Raises:
        ConfigError: as `regression` does.
    """
    errors = _errors_per_output(targets, values, None)
    spread = (targets.mean(axis=0), targets.std(axis=0), targets.min(axis=0), targets.max(axis=0))
    columns = [*errors.values(), *spread]
    return tuple(
        OutputRow(label, *(float(column[i]) for column in columns))
        for i, label in enumerate(labels)
    )


def _errors_per_output(targets: Array, values: Array, weights: Floats | None) -> dict[str, Floats]:
    """Compute each error for each output, (C,) each."""
    y_true, y_pred = np.asarray(targets, np.float64), np.asarray(values, np.float64)
    if y_true.ndim != 2 or y_true.shape != y_pred.shape or not y_true.size:
        raise ConfigError(
            f"targets {y_true.shape} and values {y_pred.shape}: expected (N, C) twice, N, C > 0"
        )
    if not (np.isfinite(y_true).all() and np.isfinite(y_pred).all()):
        raise ConfigError("targets and values: expected finite numbers")
    counts = np.ones(len(y_true)) if weights is None else np.asarray(weights, np.float64)
    squared = np.average((y_pred - y_true) ** 2, axis=0, weights=counts)
    mean = np.average(y_true, axis=0, weights=counts)
    variance = np.average((y_true - mean) ** 2, axis=0, weights=counts)
    share = np.divide(squared, variance, out=np.ones_like(squared), where=variance > 0)
    r2 = np.where(squared == 0, 1.0, 1 - share)
    return {
        "mean_absolute_error": np.average(np.abs(y_pred - y_true), axis=0, weights=counts),
        "root_mean_squared_error": np.sqrt(squared),
        "r2_score": r2 if counts.sum() > 1 else np.full_like(r2, np.nan),
    }
