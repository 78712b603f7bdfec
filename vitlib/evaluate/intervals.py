"""Confidence intervals of metrics: of shares of photos by Wilson, of others by resampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError
from vitlib.metrics import PerPhoto, summary

LEVEL = 0.95
MICRO = ("f1_score_micro", "precision_score_micro", "recall_score_micro")


def bootstrap(
    rows: PerPhoto, resamples: int = 1000, seed: int = 0, level: float = LEVEL
) -> dict[str, tuple[float, float]]:
    """Compute an interval for each metric of `quick`.

    A share of the photos, such as the accuracy, has Wilson's interval: of 18 correct ones of 18 the
    bootstrap would say 1 to 1. Other metrics have the percentile bootstrap: as many photos as there
    are, whatever their class, are drawn with replacement (Efron and Tibshirani 1993, section 13.3).
    The same seed gives the same intervals. A metric that no draw changes has none.

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
    resampled = resample_intervals(len(rows), partial(summary, rows), resamples, seed, level)
    shares = {
        name: float(column.mean())
        for name, column in rows.columns.items()
        if np.isin(column, (0, 1)).all()
    }
    if rows.single_label is not None and "accuracy" in shares:
        # With one label a photo these three are the accuracy.
        shares |= dict.fromkeys(MICRO, shares["accuracy"])
    return {
        name: wilson(shares[name], len(rows), level) if name in shares else ends
        for name, ends in resampled.items()
        if name in shares or ends[0] < ends[1]
    }


def wilson(share: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion (Wilson 1927, JASA 22).

    Args:
        share: Share of the photos, 0..1.
        count: Number of photos, at least 1.
        level: Confidence level, 0..1.

    Returns:
        (low, high), each in 0..1.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    center = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    return max((center - half) / scale, 0.0), min((center + half) / scale, 1.0)


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
