"""Compare the preprocessing of a written checkpoint with its source's, in words and grey levels."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitlib.errors import VitlibError
from vitlib.image.processor import ImageProcessor

_WITH_PREPROCESSING = ("hf", "timm", "openclip")  # layouts whose readers look for preprocessing
_TEST_SIZE = (301, 404)  # an odd height, which makes a crop round
_COARSE = 16  # pixels between the random values of the test image, which is smooth between them
_EFFECTS = {
    "size": "the image is resized to another size",
    "shortest_edge": "the image is resized to another size",
    "fit": "the shape of the image is treated in another way",
    "multiple_of": "the image is resized to another size",
    "max_patches": "the image is resized to another size",
    "resample": "the image is resized with another filter",
    "float_resize": "the image is resized before or after the rounding to 8 bits",
    "crop_size": "another part of the image is cropped",
    "crop_rounding": "a crop whose corner falls on half a pixel starts one pixel away",
    "fill": "margins have another colour",
    "rescale_factor": "grey levels are scaled by another factor",
    "image_mean": "another mean is subtracted",
    "image_std": "the result is divided by another standard deviation",
}


def compare_preprocessing(
    before: ImageProcessor | None, after: ImageProcessor | None, layout: str
) -> tuple[str, ...]:
    """List what the written files lose of the preprocessing.

    Args:
        before: The source's preprocessing; None if it has none.
        after: That of the written files; None if they have none that vitlib can follow.
        layout: The layout that was written.

    Returns:
        A line for each difference, and one that measures all of them on an image.
    """
    if not isinstance(after, ImageProcessor):
        has_none = not isinstance(before, ImageProcessor)
        return () if has_none else ("preprocessing: the written config cannot be followed",)
    if not isinstance(before, ImageProcessor):
        return (f"preprocessing: none came with the source; {layout}'s is {after.describe()}",)
    if layout not in _WITH_PREPROCESSING:
        return (
            f"preprocessing: {layout} files have no place for it; vitlib reads it from "
            "preprocessor_config.json",
        )
    lines = before.unsupported_fields(layout)
    names = [line.removeprefix("preprocessing: ").split(" ")[0] for line in lines]
    described = [
        f"{line} ({_EFFECTS[name]})" if name in _EFFECTS else line
        for line, name in zip(lines, names, strict=True)
    ]
    measured = _measure(before, after, layout, names)
    return (*described, *([measured] if measured else []))


def _measure(before: ImageProcessor, after: ImageProcessor, layout: str, names: list[str]) -> str:
    """Describe how far the pixels of a test image differ; "" where they are equal."""
    image = _test_image(before.in_channels)
    try:
        a, b = (processor(image)[0].numpy() for processor in (before, after))
    except VitlibError:  # such an array is not an image, for instance with two channels
        return "" if before == after else f"preprocessing: {layout}'s cannot be compared"
    remedy = "for the source's own pixels, use vitlib.ImageProcessor.load(SRC)"
    if a.shape != b.shape:
        sizes = " and ".join("{1}x{2}".format(*x.shape) for x in (a, b))
        return f"preprocessing: the pixels have other sizes, {sizes}: {remedy}"
    if np.array_equal(a, b):
        return ""
    std = np.array(before.image_std or 1.0, np.float64).reshape(-1, 1, 1)
    levels = np.abs(a.astype(np.float64) - b) * std / (before.rescale_factor or 1.0)
    reason = f", because of {' and '.join(names)}" if names else ", by the rounding of numbers"
    return (
        "preprocessing: a smooth test image of {}x{} pixels differs by {} of 255 grey levels on "
        "average, at most {}{}; {}".format(
            *_TEST_SIZE, _round(levels.mean()), _round(levels.max()), reason, remedy
        )
    )


def _round(level: float) -> str:
    """Format a number of grey levels with two digits that count."""
    return f"{level:.2g}" if level < 10 or not math.isfinite(level) else f"{level:.0f}"


def _test_image(channels: int) -> npt.NDArray[np.uint8]:
    """Return an image of smooth random shapes, whose neighbouring pixels are alike as in photos.

    Args:
        channels: The number of channels.

    Returns:
        (H, W, channels) uint8, the same in every run.
    """
    height, width = _TEST_SIZE
    numbers = np.random.default_rng(0)
    shape = (channels, height // _COARSE, width // _COARSE)
    coarse = numbers.integers(0, 256, shape, dtype=np.uint8)
    planes = [Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC) for x in coarse]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)
