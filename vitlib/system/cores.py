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
    quota = read_quota()
    cores = _count_allowed()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _count_allowed() -> int:
    """Count the cores that the process may run on, whatever its quota is."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_quota() -> float | None:
    """Return the cores that the control group's quota is worth; None where there is no limit."""
    for paths in _QUOTAS:
        try:
            words = " ".join(Path(path).read_text(encoding="ascii") for path in paths).split()
            limit, period = float(words[0]), float(words[1])  # "max" is no number: no limit
        except (OSError, ValueError, IndexError):
            continue
        if limit > 0 and period > 0:
            return limit / period
    return None


def respect_quota() -> None:
    """Let OpenMP start no more threads than the quota is worth, unless its own variable is set.

    Without a quota below the cores, OpenMP's own number stays: torch takes the physical cores. Call
    it before torch is imported.
    """
    cores = count_cores()
    if cores < _count_allowed():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
