"""Matrices that resample one axis of a grid, for sizes that torch.export knows as symbols.

How data flows: the number of new points -> their places among the old points -> a weight for each
pair of a new and an old point. Every step is an operation on tensors without a branch on the size,
so that an exported file computes the matrix of each size. The numbers are those of torch's
interpolate, which resamples one axis after the other (aten/src/ATen/native/UpSample.h).

Shapes: n new points, m old points of an axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vitlib.patch_embed import ResizeRule

Kernel = Callable[[Tensor], Tensor]
# Numbers of the new points, old points between two of them, number of old points, True where the
# corner points of both grids coincide -> weights (n, m).
Weigh = Callable[[Tensor, Tensor, int, bool], Tensor]
# Fields of a ResizeRule that change nothing here, or that resize_matrix reads. A rule with another
# field that is in use has no matrix.
_FIELDS = {"mode", "antialias", "align_corners", "float32", "offset", "square"}


def resize_matrix(old: int, new: int, rule: ResizeRule, spread: Tensor | None = None) -> Tensor:
    """Compute the matrix that resamples an axis as torch's interpolate does.

    Args:
        old: Number of old points, m.
        new: Number of new points, n; may be symbolic.
        rule: Arguments of the interpolation.
        spread: Number of new points that the old ones are spread over, of which the first n are
            taken, an int64 scalar; None: n.

    Returns:
        Weights, (n, m), float32; each row sums to 1.
    """
    step = _compute_step(old, count_points(new) if spread is None else spread, rule)
    points = torch.arange(new, dtype=torch.float32, device="cpu")
    return KERNELS[rule.mode, rule.antialias](points, step, old, rule.align_corners)


def count_points(count: int) -> Tensor:
    """Return the number of points of an axis as a tensor.

    Args:
        count: The number; may be symbolic.

    Returns:
        An int64 scalar.
    """
    return torch.full((), count, dtype=torch.int64, device="cpu")


def has_matrix(rule: ResizeRule) -> bool:
    """Return True if resize_matrix computes what a rule says.

    Args:
        rule: Arguments of an interpolation.
    """
    usual, values = ResizeRule("")._asdict(), rule._asdict()
    others = [name for name in values.keys() - _FIELDS if values[name] != usual.get(name)]
    return (rule.mode, rule.antialias) in KERNELS and not others


def identity_matrix(old: int, new: int) -> Tensor:
    """Compute a matrix with ones on the diagonal.

    Args:
        old: Number of old points, m.
        new: Number of new points, n; may be symbolic.

    Returns:
        Ones on the diagonal and zeros elsewhere, (n, m), float32.
    """
    return _pick(torch.arange(new, dtype=torch.int64, device="cpu"), old)


def _compute_step(old: int, new: Tensor, rule: ResizeRule) -> Tensor:
    """Compute the number of old points between two new ones, a float32 scalar."""
    count = new.double()
    if rule.align_corners:
        # One new point lies on the first old one.
        return ((old - 1) / (count - 1).clamp(min=1) * (count > 1)).float()
    return (old / (count + rule.offset)).float()


def _locate(points: Tensor, step: Tensor, corners: bool) -> Tensor:
    """Compute the places of new points among the old ones, (n,)."""
    return points * step if corners else (points + 0.5) * step - 0.5


def _pick(chosen: Tensor, old: int) -> Tensor:
    """Compute the matrix that picks an old point for each new one, (n, ...) -> (n, ..., m)."""
    return (chosen[..., None] == torch.arange(old, dtype=chosen.dtype)).float()


def _nearest(points: Tensor, step: Tensor, old: int, corners: bool) -> Tensor:  # noqa: ARG001
    """Take the old point in whose cell a new one begins, (n, m)."""
    return _pick((points * step).floor().clamp(max=old - 1), old)


def _sample(
    points: Tensor, step: Tensor, old: int, corners: bool, *, kernel: Kernel, reach: int
) -> Tensor:
    """Weigh the neighbours of each new point by a kernel; the border is repeated, (n, m)."""
    places = _locate(points, step, corners)[:, None]
    left, taps = places.floor(), torch.arange(1 - reach, reach + 1, dtype=torch.float32)
    weights = kernel((places - left - taps).abs())
    return (weights[..., None] * _pick((left + taps).clamp(0, old - 1), old)).sum(dim=1)


def _filter(
    points: Tensor, step: Tensor, old: int, corners: bool, *, kernel: Kernel, reach: int
) -> Tensor:
    """Weigh old points by a kernel as wide as a new point, without those outside, (n, m)."""
    del corners, reach  # the kernel is 0 beyond its reach
    centers = ((points + 0.5) * step)[:, None]
    distances = torch.arange(old, dtype=torch.float32) + 0.5 - centers
    weights = kernel((distances / step.clamp(min=1)).abs())
    return weights / weights.sum(dim=1, keepdim=True)


def _triangle(x: Tensor) -> Tensor:
    """Weigh distances linearly, to 0 at 1."""
    return (1 - x).clamp(min=0)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Weigh distances by Keys' cubic convolution, to 0 at 2 (10.1109/TASSP.1981.1163711)."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


KERNELS: dict[tuple[str, bool], Weigh] = {  # by mode of interpolate, and if it is antialiased
    ("nearest", False): _nearest,
    ("bilinear", False): partial(_sample, kernel=_triangle, reach=1),
    ("bilinear", True): partial(_filter, kernel=_triangle, reach=1),
    ("bicubic", False): partial(_sample, kernel=partial(_cubic, a=-0.75), reach=2),
    ("bicubic", True): partial(_filter, kernel=partial(_cubic, a=-0.5), reach=2),
}
