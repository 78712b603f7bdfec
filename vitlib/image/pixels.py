"""Levels to pixels: new sides, crop, factor, mean and std, as pure functions on arrays.

Rounded where transformers rounds: see processor.py.

Shapes: H W height and width in pixels, C channels. Levels are 0..255.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from vitlib.image.configs import TORCH_MODES


class Uint8Affine(NamedTuple):
    """The map from uint8 pixels to normalised ones: pixel = uint8 * factor + offset.

    Attributes:
        factor: One number a channel.
        offset: One number a channel.
    """

    factor: tuple[float, ...]
    offset: tuple[float, ...]


def resized_sides(
    sides: tuple[int, int],
    *,
    size: tuple[int, int] | None,
    fit: str,
    shortest_edge: int | None,
    multiple_of: tuple[int, int] | None,
) -> tuple[int, int]:
    """The (height, width) that an image of (height, width) is resized to: see ImageProcessor."""
    height, width = sides
    if size is not None and fit == "squash":
        return size
    if size is not None:
        # As timm's ResizeKeepRatio counts: both sides are rounded, and none is truncated.
        ratios = (height / size[0], width / size[1])
        ratio = min(ratios) if fit == "cover" else max(ratios)
        return round(height / ratio), round(width / ratio)
    if shortest_edge is None:
        return sides
    if multiple_of is not None:
        ratio = shortest_edge / min(sides)
        pairs = zip(sides, multiple_of, strict=True)
        down, across = (max(round(side * ratio / step), 1) * step for side, step in pairs)
        return down, across
    longer = int(shortest_edge * max(sides) / min(sides))
    return (longer, shortest_edge) if height >= width else (shortest_edge, longer)


def resize_float(
    levels: npt.NDArray[Any], sides: tuple[int, int], rescale_factor: float, resample: int
) -> npt.NDArray[np.float32]:
    """(H, W, C) levels -> (h, w, C) float32: times the factor, then resized by torch, as
    transformers' DINOv3 does."""
    scaled = torch.from_numpy(levels).permute(2, 0, 1).contiguous().float() * rescale_factor
    if sides != levels.shape[:2]:
        scaled = F.interpolate(
            scaled[None], sides, mode=TORCH_MODES[resample], align_corners=False, antialias=True
        )[0]
    resized: npt.NDArray[np.float32] = scaled.permute(1, 2, 0).numpy()
    return resized


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


def normalize_values(
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
def uint8_table(
    in_channels: int,
    rescale_factor: float | None,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> npt.NDArray[np.float32]:
    """(C, 256): what each 8-bit level of each channel becomes; exact, as nothing mixes levels."""
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], in_channels, axis=1)
    table = normalize_values(levels, rescale_factor, image_mean, image_std)
    return np.ascontiguousarray(table.T)


def normalize_image(
    levels: npt.NDArray[Any],
    rescale_factor: float | None,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> npt.NDArray[np.float32]:
    """(H, W, C) levels -> (C, H, W) pixels; 8-bit levels by a table, to the same bits."""
    rule = (rescale_factor, image_mean, image_std)
    if levels.dtype != np.uint8:
        return np.ascontiguousarray(normalize_values(levels, *rule).transpose(2, 0, 1))
    table = uint8_table(levels.shape[2], *rule)
    pixels = np.empty((levels.shape[2], *levels.shape[:2]), dtype=np.float32)
    for channel, values in enumerate(table):
        np.take(values, levels[:, :, channel], out=pixels[channel], mode="clip")
    return pixels
