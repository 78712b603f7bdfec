"""How far a regression's numbers are off.

Shapes: N photos, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vitlib.errors import ConfigError
from vitlib.metrics.numpy_backend import Array, Floats


class OutputRow(NamedTuple):
    """How far one output is off."""

    label: str
    mean_absolute_error: float
    root_mean_squared_error: float
    r2_score: float
    mean: float  # of the true numbers
    std: float
    minimum: float
    maximum: float


def regression(targets: Array, values: Array, weights: Floats | None = None) -> dict[str, float]:
    """mean_absolute_error, root_mean_squared_error and r2_score of numbers (N, C), each the mean
    over the outputs, as scikit-learn's multioutput="uniform_average".

    weights: (N,) how often each photo counts, once where None. r2_score is 1 where every number is
    right and else 0 where the true ones are all alike, NaN of one photo. Raises ConfigError for
    shapes that do not fit, no photo, or what is no number.
    """
    each = _each(targets, values, weights)
    return {name: float(column.mean()) for name, column in each.items()}


def per_output(targets: Array, values: Array, labels: Sequence[str]) -> tuple[OutputRow, ...]:
    """A row for each output; labels: (C,) names. Errors are regression()'s."""
    each = _each(targets, values, None)
    spread = (targets.mean(axis=0), targets.std(axis=0), targets.min(axis=0), targets.max(axis=0))
    columns = [*each.values(), *spread]
    return tuple(
        OutputRow(label, *(float(column[i]) for column in columns))
        for i, label in enumerate(labels)
    )


def _each(targets: Array, values: Array, weights: Floats | None) -> dict[str, Floats]:
    """Of each output, (C,)."""
    true, said = np.asarray(targets, np.float64), np.asarray(values, np.float64)
    if true.ndim != 2 or true.shape != said.shape or not true.size:
        raise ConfigError(
            f"targets {true.shape} and values {said.shape}: expected (N, C) twice, N, C > 0"
        )
    if not (np.isfinite(true).all() and np.isfinite(said).all()):
        raise ConfigError("targets and values: expected finite numbers")
    many = np.ones(len(true)) if weights is None else np.asarray(weights, np.float64)
    squared = np.average((said - true) ** 2, axis=0, weights=many)
    spread = np.average((true - np.average(true, axis=0, weights=many)) ** 2, axis=0, weights=many)
    share = np.divide(squared, spread, out=np.ones_like(squared), where=spread > 0)
    r2 = np.where(squared == 0, 1.0, 1 - share)
    return {
        "mean_absolute_error": np.average(np.abs(said - true), axis=0, weights=many),
        "root_mean_squared_error": np.sqrt(squared),
        "r2_score": r2 if many.sum() > 1 else np.full_like(r2, np.nan),
    }
