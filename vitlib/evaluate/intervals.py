"""How far a metric may be off by the chance of which photos were taken."""

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
    """An interval for each metric of quick(), by the percentile bootstrap (Efron and Tibshirani
    1993, section 13.3): as many photos as there are, drawn with replacement, `resamples` times.

    Photos are drawn whatever their class. The same seed gives the same intervals; 0 resamples give
    none. Raises ConfigError for fewer than 0.
    """
    return drawn_intervals(len(rows), partial(summary, rows), resamples, seed, level)


def drawn_intervals(
    count: int,
    metrics: Callable[[npt.NDArray[np.float64]], dict[str, float]],
    resamples: int,
    seed: int,
    level: float = LEVEL,
) -> dict[str, tuple[float, float]]:
    """The same of any metrics of `count` photos, as a function of how often each counts (N,)."""
    if resamples < 0:
        raise ConfigError(f"bootstrap={resamples}: expected 0 (no intervals) or more")
    if not resamples:
        return {}
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        times = np.bincount(random.integers(0, count, count), minlength=count)
        drawn.append(metrics(times.astype(np.float64)))
    ends = (100 * (1 - level) / 2, 100 * (1 + level) / 2)
    found = {}
    for name in drawn[0]:
        low, high = np.percentile([one[name] for one in drawn], ends)
        found[name] = (float(low), float(high))
    return found
