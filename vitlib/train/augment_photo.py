"""Augmentation of one photo, as functions of the settings in augment.py.

How data flows: a photo of uint8 pixels goes in; Pillow crops, resizes and recolours it to the
model's size. After normalisation a rectangle is erased.

Every number is drawn from the generator that the caller passes, never from a global one. So the
result for a sample depends on (seed, epoch, sample) alone: see sample_rng.

Shapes: H W height and width of the photo, h w of the result, C channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

from vitlib.errors import ImageError
from vitlib.train.augment_ops import (
    draw_crop_box,
    draw_log_uniform,
    luma,
    rand_augment,
    shift_hue,
    to_planes,
)

if TYPE_CHECKING:
    from vitlib.train.augment import Augment

_STREAM = 0  # keeps these draws apart from mix.py's draws of the same seed
_ERASING_ATTEMPTS = 10  # draws of a rectangle that fits, before nothing is erased


def augment_photo(
    augment: Augment,
    photo: npt.NDArray[Any],
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    resample: int = 2,
    fill: tuple[int, ...] | None = None,
) -> npt.NDArray[Any]:
    """Augment a photo: (H, W, C) -> (h, w, C) of the same dtype.

    A photo of one channel gets only brightness and contrast jitter. A photo of neither one nor
    three channels keeps its colours.

    Args:
        augment: The settings.
        photo: Pixels (H, W, C), uint8, or float32 for a photo deeper than 8 bits.
        size: (h, w), pixels of the result.
        rng: Source of every draw.
        resample: Pillow's code of the resize filter.
        fill: One value a channel, 0 to 255, for area that a rotation or shift uncovers; None
            for mid-gray.

    Returns:
        The augmented photo (h, w, C).

    Raises:
        ImageError: The array is no photo; or it is deeper than 8 bits under RandAugment, blur
            or hue, which are defined for 8 bits.
    """
    _check_photo(augment, photo)
    if augment.crop_scale is not None:
        height, width = photo.shape[:2]
        box = draw_crop_box(height, width, augment.crop_scale, augment.crop_ratio, rng)
        photo = photo[box[0] : box[2], box[1] : box[3]]
    planes = to_planes(photo)
    if planes[0].size != (size[1], size[0]):
        method = Image.Resampling(resample)
        planes = [plane.resize((size[1], size[0]), method) for plane in planes]
    if rng.random() < augment.horizontal_flip:
        planes = [plane.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for plane in planes]
    if rng.random() < augment.vertical_flip:
        planes = [plane.transpose(Image.Transpose.FLIP_TOP_BOTTOM) for plane in planes]
    if photo.dtype != np.uint8:
        return _jitter_float(augment, np.stack([np.asarray(p) for p in planes], axis=2), rng)
    planes = _recolor(augment, planes, fill, rng)
    if len(planes) == 1:
        return np.atleast_3d(np.asarray(planes[0]))
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def _recolor(
    augment: Augment,
    planes: list[Image.Image],
    fill: tuple[int, ...] | None,
    rng: np.random.Generator,
) -> list[Image.Image]:
    """Apply jitter, RandAugment, grayscale and blur to the planes of a uint8 photo."""
    if len(planes) == 1:
        planes = [_jitter_image(augment, planes[0], rng)]
    for _ in range(augment.rand_augment_ops):
        planes = rand_augment(planes, augment.rand_augment_magnitude / 10, fill, rng)
    if planes[0].mode == "RGB" and rng.random() < augment.grayscale_prob:
        planes = [planes[0].convert("L").convert("RGB")]
    if rng.random() < augment.blur_prob:
        blur = ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))
        planes = [plane.filter(blur) for plane in planes]
    return planes


def _check_photo(augment: Augment, photo: npt.NDArray[Any]) -> None:
    """Raise ImageError for an array that apply() cannot augment."""
    if photo.dtype not in (np.uint8, np.float32) or photo.ndim != 3 or 0 in photo.shape:
        raise ImageError(
            f"an array of shape {photo.shape} and {photo.dtype}: expected (height, width, "
            "channels) of uint8 or float32"
        )
    names = ("rand_augment_ops", "blur_prob", "hue")
    unsupported = [name for name in names if getattr(augment, name)]
    if unsupported and photo.dtype != np.uint8:
        raise ImageError(
            f"a photo deeper than 8 bits, and {unsupported[0]}={getattr(augment, unsupported[0])} "
            f"is for 8 bits: set {', '.join(f'{name}=0' for name in unsupported)}"
        )


def _jitter_float(
    augment: Augment, photo: npt.NDArray[np.float32], rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Jitter (H, W, C) float32 by Pillow's arithmetic, without its rounding to 8 bits."""
    strengths = (augment.brightness, augment.contrast, augment.saturation)
    # One channel has brightness and contrast, three have saturation too, others none.
    num_ops = {1: 2, 3: 3}.get(photo.shape[2], 0)
    if num_ops and any(strengths) and rng.random() < augment.color_jitter_prob:
        for op in rng.permutation(num_ops):
            strength = strengths[op]
            factor = np.float32(rng.uniform(max(0.0, 1 - strength), 1 + strength))
            gray = luma(photo)
            target = (np.float32(0), gray.mean(dtype=np.float32), gray)[op]
            photo = (target + (photo - target) * factor).astype(np.float32)
    if photo.shape[2] == 3 and rng.random() < augment.grayscale_prob:
        photo = np.repeat(luma(photo), 3, axis=2)
    return photo


def _jitter_image(augment: Augment, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Jitter the colours of an RGB or L image, with the probability of color_jitter_prob."""
    strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    if rng.random() >= augment.color_jitter_prob or not any(strengths):
        return image
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for op in rng.permutation(4 if image.mode == "RGB" else 2):
        strength = strengths[op]
        if not strength:
            continue
        if op == 3:
            image = shift_hue(image, rng.uniform(-strength, strength))
        else:
            factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
            image = enhancers[op](image).enhance(factor)
    return image


def erase_rectangle(
    augment: Augment, pixels: npt.NDArray[np.float32], rng: np.random.Generator
) -> None:
    """Erase a rectangle of normalised pixels in place (1708.04896, algorithm 1).

    Args:
        augment: The settings.
        pixels: (C, h, w), changed in place with the probability of random_erasing.
        rng: Source of every draw.
    """
    if rng.random() >= augment.random_erasing:
        return
    height, width = pixels.shape[1:]
    for _ in range(_ERASING_ATTEMPTS):
        area = height * width * rng.uniform(*augment.erasing_scale)
        ratio = draw_log_uniform(augment.erasing_ratio, rng)
        down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (0 < down < height and 0 < across < width):
            continue
        top = int(rng.integers(height - down + 1))
        left = int(rng.integers(width - across + 1))
        rectangle = pixels[:, top : top + down, left : left + across]
        # Normalisation has subtracted the mean colour.
        rectangle[:] = 0.0
        if augment.erasing_fill == "noise":
            rectangle[:] = rng.standard_normal(rectangle.shape, dtype=np.float32)
        return


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Create the generator of a sample's augmentation in an epoch.

    It is the same in any batch and in any process.

    Args:
        seed: Seed of the run, at least 0.
        epoch: Epoch, from 0.
        sample: Index of the photo in the training set.

    Returns:
        A new generator.
    """
    sequence = np.random.SeedSequence((seed, epoch, sample), spawn_key=(_STREAM,))
    return np.random.Generator(np.random.PCG64(sequence))
