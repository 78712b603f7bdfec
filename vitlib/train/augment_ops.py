"""What augmentation does to an image, as functions on Pillow images: crop, hue, RandAugment.

An image is its planes: one of mode RGB, or one of mode L for each channel.

Shapes: H W height and width in pixels, C channels. Levels are 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

_ATTEMPTS = 10  # at a crop that fits, before the middle is taken


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """A random crop of a photo, (top, left, bottom, right) in pixels: an even draw of its share of
    the area, and of the logarithm of its width over height (Szegedy 1409.4842, section 6).

    Where none of ten draws fits, the largest in the middle whose shape is allowed.
    """
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        shape = even_in_log(ratio, rng)
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


def even_in_log(limits: tuple[float, float], rng: np.random.Generator) -> float:
    """A number between two, its logarithm drawn evenly."""
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


def turn_hue(image: Image.Image, share: float) -> Image.Image:
    """An RGB image with its hues turned by a share of the colour circle, -0.5..0.5."""
    hue, saturation, value = image.convert("HSV").split()
    step = round(share * 256)
    hue = hue.point([(level + step) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def luma(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(H, W, C) -> (H, W, 1): ITU-R 601-2 luma of three channels, as Pillow's; of one, itself."""
    if levels.shape[2] == 1:
        return levels
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    gray: npt.NDArray[np.float32] = (levels @ weights)[:, :, None]
    return gray


def planes_of(levels: npt.NDArray[Any]) -> list[Image.Image]:
    """(H, W, C) uint8 or float32 -> one RGB plane, or one of mode L or F for each channel."""
    if levels.shape[2] == 3 and levels.dtype == np.uint8:
        return [Image.fromarray(np.ascontiguousarray(levels))]
    return [
        Image.fromarray(np.ascontiguousarray(levels[:, :, channel]))
        for channel in range(levels.shape[2])
    ]


# RandAugment's list (1909.13719, figure 2): what each does to an image with a strength of -1..1.
# The ranges are AutoAugment's (1805.09501, table 6), and all grow with the strength.
_COLOURS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "solarize": lambda image, strength: ImageOps.solarize(image, round(256 - 256 * abs(strength))),
    "posterize": lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    "color": lambda image, strength: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
    "contrast": lambda image, strength: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
    "brightness": lambda image, by: ImageEnhance.Brightness(image).enhance(1 + 0.9 * by),
    "sharpness": lambda image, by: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * by),
}
# Of a point of the new image, where it is in the old one: x' = a x + b y + c, y' = d x + e y + f.
_MOVES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "rotate": lambda by, w, h: _about_middle(*_turned(math.radians(30) * by), w, h),
    "shear_x": lambda by, w, h: _about_middle(1, 0.3 * by, 0, 1, w, h),
    "shear_y": lambda by, w, h: _about_middle(1, 0, 0.3 * by, 1, w, h),
    "translate_x": lambda by, w, _: (1, 0, 0.45 * by * w, 0, 1, 0),
    "translate_y": lambda by, _, h: (1, 0, 0, 0, 1, 0.45 * by * h),
}
RAND_AUGMENT = ("identity", *_COLOURS, *_MOVES)


def _turned(angle: float) -> tuple[float, float, float, float]:
    return math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)


def _about_middle(
    a: float, b: float, d: float, e: float, width: int, height: int
) -> tuple[float, ...]:
    """The move that leaves the middle of the image where it is."""
    x, y = width / 2, height / 2
    return a, b, x - a * x - b * y, d, e, y - d * x - e * y


def rand_augment(
    planes: list[Image.Image],
    strength: float,
    fill: tuple[int, ...] | None,
    rng: np.random.Generator,
) -> list[Image.Image]:
    """One operation of the list, one way or the other."""
    name = RAND_AUGMENT[int(rng.integers(len(RAND_AUGMENT)))]
    strength = strength if rng.random() < 0.5 else -strength
    return operate(name, planes, strength, fill)


def operate(
    name: str, planes: list[Image.Image], strength: float, fill: tuple[int, ...] | None = None
) -> list[Image.Image]:
    """What an operation of RandAugment makes of an image's planes; strength in -1..1.

    What changes colours leaves an image of other than one or three channels as it is.
    """
    if name in _COLOURS:
        one = len(planes) == 1 and (name != "color" or planes[0].mode == "RGB")
        return [_COLOURS[name](planes[0], strength)] if one else planes
    if name == "identity":
        return planes
    matrix = _MOVES[name](strength, *planes[0].size)
    colours: list[Any] = [128] * len(planes) if fill is None else list(fill)
    if planes[0].mode == "RGB":
        colours = [(128, 128, 128) if fill is None else tuple(fill)]
    how = (Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return [
        plane.transform(plane.size, *how, fillcolor=colour)
        for plane, colour in zip(planes, colours, strict=True)
    ]
