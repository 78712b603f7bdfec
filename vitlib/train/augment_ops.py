"""Operations of augmentation as functions on Pillow images: crop, hue, RandAugment.

A photo is a list of planes: one image of mode RGB, or one of mode L or F for each channel.

Shapes: H W height and width in pixels, C channels. uint8 pixels are 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

_CROP_ATTEMPTS = 10  # draws of a crop that fits, before the centre is taken


def draw_crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw a random crop of a photo (Szegedy 1409.4842, section 6).

    Its share of the area is uniform, and so is the logarithm of its width over height. If none of
    ten draws fits, the crop is the largest centred box of an allowed shape.

    Args:
        height: Height of the photo in pixels.
        width: Width of the photo in pixels.
        scale: Smallest and largest share of the area, in (0, 1].
        ratio: Smallest and largest width over height.
        rng: Source of every draw.

    Returns:
        (top, left, bottom, right) in pixels.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        shape = draw_log_uniform(ratio, rng)
        across, down = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < across <= width and 0 < down <= height:
            top = int(rng.integers(height - down + 1))
            left = int(rng.integers(width - across + 1))
            return top, left, top + down, left + across
    low, high = ratio
    across = max(1, min(width, round(height * high)))
    down = max(1, min(height, round(width / low)))
    top, left = (height - down) // 2, (width - across) // 2
    return top, left, top + down, left + across


def draw_log_uniform(limits: tuple[float, float], rng: np.random.Generator) -> float:
    """Draw a number whose logarithm is uniform.

    Args:
        limits: Smallest and largest number, above 0.
        rng: Source of the draw.

    Returns:
        The number.
    """
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Rotate the hues of an RGB image around the colour circle.

    Args:
        image: An image of mode RGB.
        turn: Share of a full turn, -0.5 to 0.5.

    Returns:
        A new RGB image.
    """
    hue, saturation, value = image.convert("HSV").split()
    step = round(turn * 256)
    hue = hue.point([(level + step) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def luma(photo: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Compute Pillow's gray values (ITU-R 601-2 luma).

    Args:
        photo: (H, W, C) float32 with one or three channels.

    Returns:
        (H, W, 1); a photo of one channel itself.
    """
    if photo.shape[2] == 1:
        return photo
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    gray: npt.NDArray[np.float32] = (photo @ weights)[:, :, None]
    return gray


def to_planes(photo: npt.NDArray[Any]) -> list[Image.Image]:
    """Convert an array to planes.

    Args:
        photo: (H, W, C) uint8 or float32.

    Returns:
        One RGB image for three uint8 channels, else one image of mode L or F for each channel.
    """
    if photo.shape[2] == 3 and photo.dtype == np.uint8:
        return [Image.fromarray(np.ascontiguousarray(photo))]
    return [
        Image.fromarray(np.ascontiguousarray(photo[:, :, channel]))
        for channel in range(photo.shape[2])
    ]


# RandAugment's list (1909.13719, figure 2): each operation on an image, by a strength of -1..1.
# The ranges are AutoAugment's (1805.09501, table 6), and all grow with the strength.
_COLOR_OPS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "solarize": lambda image, strength: ImageOps.solarize(image, round(256 - 256 * abs(strength))),
    "posterize": lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    "color": lambda image, strength: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
    "contrast": lambda image, strength: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
    "brightness": lambda image, by: ImageEnhance.Brightness(image).enhance(1 + 0.9 * by),
    "sharpness": lambda image, by: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * by),
}
# Affine maps from a point of the new image to the old one: x' = a x + b y + c, y' = d x + e y + f.
_GEOMETRIC_OPS: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "rotate": lambda by, w, h: _about_center(*_rotation(math.radians(30) * by), w, h),
    "shear_x": lambda by, w, h: _about_center(1, 0.3 * by, 0, 1, w, h),
    "shear_y": lambda by, w, h: _about_center(1, 0, 0.3 * by, 1, w, h),
    "translate_x": lambda by, w, _: (1, 0, 0.45 * by * w, 0, 1, 0),
    "translate_y": lambda by, _, h: (1, 0, 0, 0, 1, 0.45 * by * h),
}
RAND_AUGMENT = ("identity", *_COLOR_OPS, *_GEOMETRIC_OPS)


def _rotation(angle: float) -> tuple[float, float, float, float]:
    """Return the matrix (a, b, d, e) of a rotation by radians."""
    return math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)


def _about_center(
    a: float, b: float, d: float, e: float, width: int, height: int
) -> tuple[float, ...]:
    """Return the affine map of a matrix that keeps the centre of the image in place."""
    x, y = width / 2, height / 2
    return a, b, x - a * x - b * y, d, e, y - d * x - e * y


def rand_augment(
    planes: list[Image.Image],
    strength: float,
    fill: tuple[int, ...] | None,
    rng: np.random.Generator,
) -> list[Image.Image]:
    """Apply one random operation of RandAugment in a random direction.

    Args:
        planes: A photo.
        strength: 0 to 1.
        fill: As in apply_op.
        rng: Source of every draw.

    Returns:
        The planes of the new photo.
    """
    name = RAND_AUGMENT[int(rng.integers(len(RAND_AUGMENT)))]
    strength = strength if rng.random() < 0.5 else -strength
    return apply_op(name, planes, strength, fill)


def apply_op(
    name: str, planes: list[Image.Image], strength: float, fill: tuple[int, ...] | None = None
) -> list[Image.Image]:
    """Apply an operation of RandAugment.

    An operation on colours leaves photos of neither one nor three channels as they are.

    Args:
        name: An item of RAND_AUGMENT.
        planes: A photo.
        strength: -1 to 1.
        fill: One value a channel for uncovered area, 0 to 255; None for mid-gray.

    Returns:
        The planes of the new photo.
    """
    if name in _COLOR_OPS:
        applies = len(planes) == 1 and (name != "color" or planes[0].mode == "RGB")
        return [_COLOR_OPS[name](planes[0], strength)] if applies else planes
    if name == "identity":
        return planes
    matrix = _GEOMETRIC_OPS[name](strength, *planes[0].size)
    colors: list[Any] = [128] * len(planes) if fill is None else list(fill)
    if planes[0].mode == "RGB":
        colors = [(128, 128, 128) if fill is None else tuple(fill)]
    method = (Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return [
        plane.transform(plane.size, *method, fillcolor=color)
        for plane, color in zip(planes, colors, strict=True)
    ]
