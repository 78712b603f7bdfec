"""Levels to pixels: the crop, the factor, mean and std, as pure functions on arrays.

Rounded where transformers rounds: see preprocess.py.

Shapes: H W height and width in pixels, C channels. Levels are 0..255.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt


def center_crop(
    levels: npt.NDArray[Any],
    size: tuple[int, int],
    rounding: str = "floor",
    fill: tuple[int, ...] | None = None,
) -> npt.NDArray[Any]:
    """The middle of an image: (H, W, C) -> (h, w, C), with `fill` around where it is too small.

    `rounding` says where the middle is if it is half a pixel off: see ImageProcessor.
    """
    starts = [
        crop_start(have - want, rounding) for have, want in zip(levels.shape, size, strict=False)
    ]
    top, left = (max(start, 0) for start in starts)
    inside = levels[top : top + size[0], left : left + size[1]]
    if inside.shape[:2] == size:
        return inside
    cropped = np.zeros((*size, levels.shape[2]), levels.dtype)
    if fill is not None:
        cropped[:] = fill
    top, left = (max(-start, 0) for start in starts)
    cropped[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return cropped


def crop_start(spare: int, rounding: str) -> int:
    """Where the cut starts in an axis that has so many pixels to spare; before it, if negative."""
    if rounding == "floor":
        return spare // 2
    if rounding == "even" and spare > 0:
        return round(spare / 2)
    return int(spare / 2)


def scale(
    levels: npt.NDArray[Any],
    rescale_factor: float | None,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> npt.NDArray[np.float32]:
    """(..., C) levels -> (..., C) pixels, rounded where transformers rounds."""
    pixels: npt.NDArray[np.float32] = levels.astype(np.float32)
    if rescale_factor is not None:
        pixels = (levels.astype(np.float64) * rescale_factor).astype(np.float32)
    if image_mean is None or image_std is None:
        return pixels
    mean, std = (np.array(values, dtype=np.float32) for values in (image_mean, image_std))
    pixels = (pixels - mean) / std
    return pixels


@lru_cache(maxsize=32)
def level_table(
    in_channels: int,
    rescale_factor: float | None,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> npt.NDArray[np.float32]:
    """(C, 256): what each 8-bit level of each channel becomes; exact, as nothing mixes levels."""
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], in_channels, axis=1)
    table = scale(levels, rescale_factor, image_mean, image_std)
    return np.ascontiguousarray(table.T)
