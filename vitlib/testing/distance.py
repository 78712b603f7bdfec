"""Distances between tensors, and the largest that counts as equal."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

# Two correct implementations sum float32 in another order. They differ by at most 2e-6 for tiny
# models and 5e-6 at ViT-B size, and by more with each block. The smallest known mistake of
# numerics, tanh in place of erf GELU, makes 5e-4.
TOLERANCE = 5e-6
_TOLERANCE_DEPTH = 12  # deeper models get a tolerance in proportion to their depth


class Difference(NamedTuple):
    """Distance of a tensor from its reference.

    Attributes:
        max: Largest |a - b|; infinity where the shapes differ or a value is not finite.
        mean: Mean |a - b|.
        relative: `max`, relative to the largest |b|.
    """

    max: float
    mean: float
    relative: float

    def __str__(self) -> str:
        if math.isinf(self.max):
            return "another shape, or values that are not finite"
        return f"max {self.max:.2g}, mean {self.mean:.2g}, relative {self.relative:.2g}"


def measure_difference(a: Tensor, b: Tensor) -> Difference:
    """Measure the distance of a tensor from its reference.

    Args:
        a: Any shape.
        b: The reference.

    Returns:
        The distance.
    """
    if a.shape != b.shape:
        return Difference(math.inf, math.inf, math.inf)
    a, b = a.detach(), b.detach()
    gap = (a - b).abs()
    worst, mean, largest = float(gap.max()), float(gap.mean()), float(b.abs().max())
    if not math.isfinite(worst) or not math.isfinite(largest):
        return Difference(math.inf, math.inf, math.inf)
    if not worst:
        return Difference(0.0, 0.0, 0.0)
    return Difference(worst, mean, worst / largest if largest else math.inf)


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| / max |b|.

    Args:
        a: Any shape.
        b: The reference.

    Returns:
        0 or more; infinity where the shapes differ or a value is not finite.
    """
    return measure_difference(a, b).relative


def float32_tolerance(depth: int) -> float:
    """Return the largest max |a - b| / max |b| at which two float32 models count as equal.

    Args:
        depth: Number of blocks.
    """
    return TOLERANCE * max(1.0, depth / _TOLERANCE_DEPTH)
