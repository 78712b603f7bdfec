"""Normalized cross-correlation of parts with every window of wholes (Lewis 1995), in batches.

Shapes: N photos, P pairs, S pixels of a side, h w pixels of a part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Standard deviation of brightness, 0..255, below which an overlap has nothing to compare.
LEAST_CONTRAST = 2.0
FEW_WINDOWS = 9  # up to so many places, a part is compared with each


class Wholes(NamedTuple):
    """Photos that parts are searched in; each is prepared once, for parts of any size.

    Attributes:
        images: (N, S, S) brightness around its mean.
        spectrum: (N, S, S // 2 + 1) of them.
        sums: (N, S + 1, S + 1) sums of brightness from the corner, float64.
        squares: (N, S + 1, S + 1) sums of its squares.
    """

    images: Tensor
    spectrum: Tensor
    sums: Tensor
    squares: Tensor


def prepare_wholes(images: Tensor) -> Wholes:
    """Prepare photos to search parts in.

    Args:
        images: (N, S, S) brightness, 0..255.

    Returns:
        The photos.
    """
    # Around their mean, the squares of large brightness do not cancel in float32.
    centred = images - images.mean(dim=(1, 2), keepdim=True)
    sums = (_sum_from_corner(values) for values in (centred, centred**2))
    return Wholes(centred, torch.fft.rfft2(centred), *sums)


def correlate(wholes: Wholes, rows: Tensor, part: Tensor) -> Tensor:
    """Correlate parts with every window of their size in wholes.

    Args:
        wholes: N photos.
        rows: (P,) the whole of each pair, 0..N-1.
        part: (P, h, w) brightness.

    Returns:
        (P, S - h + 1, S - w + 1) Pearson's correlation, -1..1; 0 where the window or the part is
        of one brightness.
    """
    side, (h, w) = wholes.images.shape[-1], part.shape[-2:]
    count, heights, widths = h * w, side - h + 1, side - w + 1
    part = part - part.mean(dim=(1, 2), keepdim=True)
    if heights * widths <= FEW_WINDOWS:  # cheaper than a transform
        image = wholes.images[rows]
        products = torch.stack(
            [
                (image[:, y : y + h, x : x + w] * part).sum(dim=(1, 2))
                for y in range(heights)
                for x in range(widths)
            ],
            dim=1,
        ).reshape(-1, heights, widths)
    else:
        spectrum = wholes.spectrum[rows] * torch.fft.rfft2(part, s=(side, side)).conj()
        products = torch.fft.irfft2(spectrum, s=(side, side))[:, :heights, :widths]
    mean, square = (_window_sums(x, rows, h, w) / count for x in (wholes.sums, wholes.squares))
    variance = square - mean**2
    part_variance = part.pow(2).mean(dim=(1, 2))[:, None, None]
    least = LEAST_CONTRAST**2
    valid = (variance >= least) & (part_variance >= least)
    scale = (variance.clamp(min=least) * part_variance.clamp(min=least)).sqrt()
    return torch.where(valid, products / (count * scale), 0.0).clamp(-1, 1)


def _sum_from_corner(values: Tensor) -> Tensor:
    """Sum (N, S, S) from the upper left corner to each pixel, (N, S + 1, S + 1) in float64."""
    return F.pad(values.double().cumsum(dim=1).cumsum(dim=2), (1, 0, 1, 0))


def _window_sums(sums: Tensor, rows: Tensor, h: int, w: int) -> Tensor:
    """Sum every window of some photos, by differences of sums from the corner."""
    last = sums.shape[-1]
    upper = sums[rows, : last - h, w:] - sums[rows, : last - h, : last - w]
    lower = sums[rows, h:, w:] - sums[rows, h:, : last - w]
    return (lower - upper).float()


def find_corners(scores: Tensor) -> Tensor:
    """Find the place of the greatest correlation, between pixels.

    Args:
        scores: (P, R, C) of correlate().

    Returns:
        (P, 2) row and column.
    """
    columns = scores.shape[2]
    offsets = scores.flatten(1).argmax(dim=1)
    corners = torch.stack([offsets // columns, offsets % columns], dim=1)
    return corners + _refine(scores, corners)


def _refine(scores: Tensor, corners: Tensor) -> Tensor:
    """Find the top of the parabola through the best correlation and its neighbours, (P, 2)."""
    index = torch.arange(len(scores), device="cpu")
    shifts = torch.zeros(len(scores), 2, dtype=torch.float32, device="cpu")
    for axis in range(2):
        last = scores.shape[1 + axis] - 1
        if last < 2:
            continue
        values = []
        for step in (-1, 0, 1):
            corner = corners.clone()
            corner[:, axis] = (corner[:, axis] + step).clamp(0, last)
            values.append(scores[index, corner[:, 0], corner[:, 1]])
        before, best, after = values
        bend = (before - 2 * best + after).clamp(max=-1e-6)
        inside = (corners[:, axis] > 0) & (corners[:, axis] < last)
        shift = (0.5 * (before - after) / bend).clamp(-0.5, 0.5)
        shifts[:, axis] = torch.where(inside, shift, 0.0)
    return shifts
