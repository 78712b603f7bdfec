"""The cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

# Limits of the control group that a container sees as its own (cgroup v2, then v1).
_QUOTAS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def count_cores() -> int:
    """Count the cores that this process may use, at least 1.

    On a machine of 64 cores a container may have 2 of them: by its affinity, or by a quota of time,
    which neither Python nor torch looks at. More threads than that wait for each other.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quota = read_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def read_quota() -> float | None:
    """Return the cores that the control group's quota is worth; None where there is no limit."""
    for paths in _QUOTAS:
        try:
            words = " ".join(Path(path).read_text() for path in paths).split()
            limit, period = float(words[0]), float(words[1])  # "max" is no number: no limit
        except (OSError, ValueError, IndexError):
            continue
        if limit > 0 and period > 0:
            return limit / period
    return None


def respect_quota() -> None:
    """Let OpenMP start no more threads than the quota is worth, unless its own variable is set.

    Call it before torch is imported.
    """
    if read_quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(count_cores()))
