"""Confidence intervals of metrics, by resampling the photos."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError
from vitlib.metrics import PerPhoto, summary

LEVEL = 0.95


def bootstrap(
    rows: PerPhoto, resamples: int = 1000, seed: int = 0, level: float = LEVEL
) -> dict[str, tuple[float, float]]:
    """Compute an interval for each metric of `quick`, by the percentile bootstrap.

    As many photos as there are, whatever their class, are drawn with replacement (Efron and
    Tibshirani 1993, section 13.3). The same seed gives the same intervals.

    Args:
        rows: the terms of each photo.
        resamples: number of draws; 0 computes no intervals.
        seed: of the draws.
        level: share of the draws within the interval, 0..1.

    Returns:
        (low, high) by the metric's name.

    Raises:
        ConfigError: for fewer than 0 resamples.
    """
    return resample_intervals(len(rows), partial(summary, rows), resamples, seed, level)


def resample_intervals(
    count: int,
    metrics: Callable[[npt.NDArray[np.float64]], dict[str, float]],
    resamples: int,
    seed: int,
    level: float = LEVEL,
) -> dict[str, tuple[float, float]]:
    """Compute an interval for each of any metrics, by the percentile bootstrap.

    Args:
        count: N, the number of photos.
        metrics: function of how often each photo counts, (N,), that returns values by name.
        resamples: number of draws; 0 computes no intervals.
        seed: of the draws.
        level: share of the draws within the interval, 0..1.

    Returns:
        (low, high) by the metric's name.

    Raises:
        ConfigError: for fewer than 0 resamples.
    """
    if resamples < 0:
        raise ConfigError(f"bootstrap={resamples}: expected 0 (no intervals) or more")
    if not resamples:
        return {}
    random = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        times = np.bincount(random.integers(0, count, count), minlength=count)
        values.append(metrics(times.astype(np.float64)))
    percentiles = (100 * (1 - level) / 2, 100 * (1 + level) / 2)
    intervals = {}
    for name in values[0]:
        low, high = np.percentile([sample[name] for sample in values], percentiles)
        intervals[name] = (float(low), float(high))
    return intervals
