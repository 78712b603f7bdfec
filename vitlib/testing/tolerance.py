"""The bounds within which two modules count as equal where the caller gives none.

In float32 it is 5e-6 of an output's largest value, and more for many blocks. Rounding to bfloat16
or float16 is far larger, and would hide most mistakes. So two modules of which one is in such a
dtype are compared twice: as they are, within a coarse bound, and as copies in float32 with the same
rounded weights, within the bound of float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitlib.errors import ConfigError, is_number
from vitlib.testing.distance import float32_tolerance
from vitlib.testing.report import ParityError
from vitlib.testing.states import Subject

# Relative bounds of modules as they are: twice the distance from float32 of DeiT-tiny's logits and
# DINOv2-small's tokens on photos, 3e-3 and 3e-2.
_COARSE = {torch.float16: 6e-3, torch.bfloat16: 6e-2}


class Tolerance(NamedTuple):
    """Bounds of a comparison.

    Attributes:
        atol: Largest |a - b|.
        rtol: The same, relative to the largest |b|; it is added to `atol`.
        coarse: The dtype for which the bounds are coarse; None where they are not, or the caller's.
    """

    atol: float
    rtol: float
    coarse: torch.dtype | None = None


def resolve_tolerance(
    subjects: tuple[Subject, Subject], atol: float | None, rtol: float | None
) -> Tolerance:
    """Choose the tolerances that the caller leaves out.

    Args:
        subjects: Both modules.
        atol: As in assert_same.
        rtol: As in assert_same.

    Returns:
        The bounds.

    Raises:
        ConfigError: One is no number of at least 0.
    """
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and (not is_number(value) or value < 0):
            raise ConfigError(f"{name}={value!r}: expected a number of at least 0")
    if atol is not None or rtol is not None:
        return Tolerance(atol or 0.0, rtol or 0.0)
    coarse = coarsest_dtype(subjects)
    if coarse not in _COARSE:
        return Tolerance(0.0, float32_bound(subjects))
    return Tolerance(0.0, max(float32_bound(subjects), _COARSE[coarse]), coarse)


def float32_bound(subjects: tuple[Subject, Subject]) -> float:
    """Return the relative bound of two modules in float32.

    Args:
        subjects: Both modules.
    """
    return float32_tolerance(max(subject.depth for subject in subjects))


def coarsest_dtype(subjects: tuple[Subject, Subject]) -> torch.dtype:
    """Return the dtype of the fewest bits that a weight of two modules has.

    Args:
        subjects: Both modules.
    """
    dtypes = [
        parameter.dtype
        for subject in subjects
        for parameter in subject.module.parameters()
        if parameter.is_floating_point()
    ]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def is_rounding(error: ParityError, coarse: torch.dtype) -> bool:
    """Return True if copies in float32 of modules in a coarse dtype differ by rounding alone.

    A module may hold a weight in another form, as positions to which the class token is added or a
    table of angles: it is rounded otherwise. What differs first then differs by less than one
    rounding. So does a small mistake, but of those a trial finds the usual ones.

    Args:
        error: The difference of the copies.
        coarse: The dtype to which weights were rounded.
    """
    finding = error.finding
    if finding.is_rounding:
        return True
    # Where no point inside is known, no trial has looked at single parts.
    if finding.is_certain or not finding.compared or finding.difference is None:
        return False
    differences = [finding.difference, *(difference for difference, _ in error.outputs.values())]
    return max(d.relative for d in differences) <= torch.finfo(coarse).eps / 2
