"""Resize, crop and normalise arrays of 0..255 to pixels, as pure functions.

Results are rounded where transformers rounds: see processor.py. Two forms of the normalisation
exist for a reason. normalize_values() rounds after the rescale and after each further step, as
transformers does, so its bits are the reference's. Uint8Affine is the same map as one factor and
one offset a channel, in float64, which a fast model folds into its patch projection.

Shapes: H W height and width in pixels, C channels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from vitlib.image.configs import TORCH_MODES

if TYPE_CHECKING:
    import numpy.typing as npt


class Uint8Affine(NamedTuple):
    """The map from uint8 pixels to normalised ones: pixel = uint8 * factor + offset.

    Attributes:
        factor: One number a channel.
        offset: One number a channel.
    """

    factor: tuple[float, ...]
    offset: tuple[float, ...]


def patches_sides(
    sides: tuple[int, int], patch_size: tuple[int, int], max_patches: int
) -> tuple[int, int]:
    """Return the sides of the most whole patches, as transformers' Siglip2ImageProcessor.

    Args:
        sides: (height, width) of an image, whose aspect ratio is kept up to a patch.
        patch_size: (height, width) of a patch.
        max_patches: The most patches.

    Returns:
        The new (height, width).
    """
    # Bisection for the scale, with the bounds and the precision of transformers: another would give
    # other sides where a side is close to a whole patch.
    low, high = 1e-6, 100.0
    down, across = 1, 1
    while True:
        is_last = high - low < 1e-5
        scale = low if is_last else (low + high) / 2
        down, across = (
            max(math.ceil(side * scale / patch), 1)
            for side, patch in zip(sides, patch_size, strict=True)
        )
        if is_last:
            return down * patch_size[0], across * patch_size[1]
        low, high = (scale, high) if down * across <= max_patches else (low, scale)


def resized_sides(
    sides: tuple[int, int],
    *,
    size: tuple[int, int] | None,
    fit: str,
    shortest_edge: int | None,
    multiple_of: tuple[int, int] | None,
    max_patches: int | None = None,
) -> tuple[int, int]:
    """Return the (height, width) to which an image is resized.

    Args:
        sides: (height, width) of the image.
        size: As in ImageProcessor.
        fit: As in ImageProcessor.
        shortest_edge: As in ImageProcessor.
        multiple_of: As in ImageProcessor.
        max_patches: As in ImageProcessor.

    Returns:
        The new (height, width).
    """
    height, width = sides
    if max_patches is not None and multiple_of is not None:
        return patches_sides(sides, multiple_of, max_patches)
    if size is not None and fit == "squash":
        return size
    if size is not None:
        # As timm's ResizeKeepRatio: both sides are rounded, not truncated.
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
    image: npt.NDArray[Any], sides: tuple[int, int], rescale_factor: float, resample: int
) -> npt.NDArray[np.float32]:
    """Rescale an image, then resize it by torch, as transformers' DINOv3 does.

    Args:
        image: (H, W, C) in 0..255.
        sides: New (h, w).
        rescale_factor: Factor of the rescale.
        resample: Pillow's code of the filter, 2 or 3.

    Returns:
        (h, w, C) float32.
    """
    scaled = torch.from_numpy(image).permute(2, 0, 1).contiguous().float() * rescale_factor
    if sides != image.shape[:2]:
        scaled = F.interpolate(
            scaled[None], sides, mode=TORCH_MODES[resample], align_corners=False, antialias=True
        )[0]
    resized: npt.NDArray[np.float32] = scaled.permute(1, 2, 0).numpy()
    return resized


def center_crop(
    image: npt.NDArray[Any],
    size: tuple[int, int],
    rounding: str = "floor",
    fill: tuple[int, ...] | None = None,
) -> npt.NDArray[Any]:
    """Crop the centre of an image.

    Args:
        image: (H, W, C).
        size: (h, w) of the crop.
        rounding: Rounding of a centre that is half a pixel off: see ImageProcessor.
        fill: Value of each channel around an image that is too small; None for 0.

    Returns:
        (h, w, C), of the image's dtype.
    """
    starts = [
        crop_start(have - want, rounding) for have, want in zip(image.shape, size, strict=False)
    ]
    top, left = (max(start, 0) for start in starts)
    inside = image[top : top + size[0], left : left + size[1]]
    if inside.shape[:2] == size:
        return inside
    cropped = np.zeros((*size, image.shape[2]), image.dtype)
    if fill is not None:
        cropped[:] = fill
    top, left = (max(-start, 0) for start in starts)
    cropped[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return cropped


def crop_start(spare: int, rounding: str) -> int:
    """Return the first pixel of a centre crop in one axis.

    Args:
        spare: Pixels of the image less those of the crop; negative if the image is smaller.
        rounding: As in ImageProcessor.crop_rounding.

    Returns:
        Index of the pixel; negative where the crop begins outside of the image.
    """
    if rounding == "floor":
        return spare // 2
    if rounding == "even" and spare > 0:
        return round(spare / 2)
    return int(spare / 2)


def normalize_values(
    values: npt.NDArray[Any],
    rescale_factor: float | None,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> npt.NDArray[np.float32]:
    """Rescale and normalise values, rounded where transformers rounds.

    Args:
        values: (..., C), in 0..255.
        rescale_factor: Factor of the rescale; None for none.
        image_mean: Mean of each channel; None for no normalisation.
        image_std: Standard deviation of each channel.

    Returns:
        (..., C) float32.
    """
    pixels: npt.NDArray[np.float32] = values.astype(np.float32)
    if rescale_factor is not None:
        pixels = (values.astype(np.float64) * rescale_factor).astype(np.float32)
    if image_mean is None or image_std is None:
        return pixels
    mean, std = (np.array(stats, dtype=np.float32) for stats in (image_mean, image_std))
    pixels = (pixels - mean) / std
    return pixels


@lru_cache(maxsize=32)
def uint8_table(
    in_channels: int,
    rescale_factor: float | None,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> npt.NDArray[np.float32]:
    """Return the pixel of each uint8 value in each channel.

    Args:
        in_channels: Channels C.
        rescale_factor: As in normalize_values().
        image_mean: As in normalize_values().
        image_std: As in normalize_values().

    Returns:
        (C, 256) float32. A lookup has the same bits as normalize_values(): a pixel depends on its
        own value alone.
    """
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None], in_channels, axis=1)
    table = normalize_values(values, rescale_factor, image_mean, image_std)
    return np.ascontiguousarray(table.T)


def normalize_image(
    image: npt.NDArray[Any],
    rescale_factor: float | None,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> npt.NDArray[np.float32]:
    """Rescale and normalise an image.

    Args:
        image: (H, W, C) in 0..255, uint8 or float32.
        rescale_factor: As in normalize_values().
        image_mean: As in normalize_values().
        image_std: As in normalize_values().

    Returns:
        (C, H, W) float32.
    """
    # A table of 256 entries replaces float64 arithmetic on every pixel of a uint8 image.
    stats = (rescale_factor, image_mean, image_std)
    if image.dtype != np.uint8:
        return np.ascontiguousarray(normalize_values(image, *stats).transpose(2, 0, 1))
    table = uint8_table(image.shape[2], *stats)
    pixels = np.empty((image.shape[2], *image.shape[:2]), dtype=np.float32)
    # mode="clip" skips NumPy's bounds check and its buffer: a uint8 index is always in range.
    for channel, values in enumerate(table):
        np.take(values, image[:, :, channel], out=pixels[channel], mode="clip")
    return pixels
