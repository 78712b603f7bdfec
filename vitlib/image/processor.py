"""Preprocessing of images to pixels: resize, crop, rescale, normalise, as the checkpoint says.

configs/ reads the steps from the checkpoint's files. The arithmetic is that of transformers'
Pillow-backed processors, to the bit; with crop_rounding="even" it is that of timm and open_clip.
Pillow resizes uint8 images, which are then scaled in float64, rounded to float32 and normalised in
float32. With float_resize it is that of transformers' DINOv3: images are scaled in float32, resized
by torch, then normalised. Images deeper than 8 bits and floats are resized as float32 planes by
Pillow's same filters, and never rounded to 8 bits: see depth.py.

Shapes: H W height and width in pixels, C channels, B images. Values before the rescale: 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vitlib.errors import ImageError
from vitlib.image.decode import (
    ImageLike,
    decode,
    describe_image,
    is_one_image,
    iter_images,
)
from vitlib.image.depth import DepthOptions, WarnOnce, log_image_warning
from vitlib.image.open_files import MAX_PIXELS
from vitlib.image.pixels import (
    Uint8Affine,
    center_crop,
    crop_start,
    normalize_image,
    normalize_values,
    resize_float,
    resized_sides,
)
from vitlib.image.prefetch import prefetch_map
from vitlib.image.preprocess_config import PreprocessConfig
from vitlib.image.resize import resize_part

if TYPE_CHECKING:
    import numpy.typing as npt

Warn = Callable[[str], None]


AT_ONCE = 32  # images of a list that are handed to the threads together


def _raise_with_index(index: int, error: ImageError) -> None:
    """Raise the error of an image of a list."""
    raise ImageError(f"image {index}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ImageProcessor(PreprocessConfig):
    """Preprocessing of a model. Call it with one image or a list of images.

    An image is a path, encoded bytes, an open binary file, a PIL image, an array or a tensor.
    decode.py says how grayscale, palette, CMYK, alpha and EXIF are handled, and depth.py says it of
    other depths than 8 bits.

    Arguments and attributes are those of PreprocessConfig: size, shortest_edge, fit, multiple_of,
    max_patches, resample, float_resize, crop_size, crop_rounding, fill, rescale_factor, image_mean,
    image_std, in_channels and levels.

    Attributes:
        draft: Decode JPEG files at 1/2, 1/4 or 1/8 of their size, at least this many times as large
            as the resized image: see with_draft(). None decodes them at their size. No file of a
            checkpoint stores it.
    """

    draft: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft is not None:
            from vitlib.image.draft import check_draft  # few programs ask for it

            check_draft(self.draft)

    def with_draft(self, margin: float = 2.0) -> ImageProcessor:
        """Return the same preprocessing with a faster, less exact decode of large JPEG files.

        docs/performance.md has its errors. The result is for this program: it is not written into a
        checkpoint.

        Args:
            margin: At least how many times as large as the resized image a JPEG is decoded, 2..8.

        Returns:
            The preprocessing, with `draft` set.

        Raises:
            ConfigError: The margin is out of range.
        """
        return replace(self, draft=margin)

    def describe(self) -> str:
        """Return the steps in one line.

        Returns:
            The steps in their order, such as "resize to 28x28 (bilinear); times 0.00392157".
        """
        draft = "" if self.draft is None else f"JPEG drafts of {self.draft:g} times the size; "
        return draft + super().describe()

    def visible_box(
        self, height: int, width: int, patch_size: tuple[int, int] = (1, 1)
    ) -> tuple[float, float, float, float]:
        """Return the box of an image that the model sees.

        Args:
            height: Height of the image.
            width: Width of the image.
            patch_size: (height, width) of a patch: the box covers whole patches.

        Returns:
            (top, left, bottom, right) in the image's pixels; beyond its edges where it is padded.
        """
        new = self._resized_sides(height, width)
        crop = self.crop_size or new
        y, x = (crop_start(n - c, self.crop_rounding) for n, c in zip(new, crop, strict=True))
        h, w = (c // p * p for c, p in zip(crop, patch_size, strict=True))
        down, across = height / new[0], width / new[1]
        return y * down, x * across, (y + h) * down, (x + w) * across

    def __call__(self, images: ImageLike | Iterable[ImageLike]) -> torch.Tensor:
        """Preprocess one image or several.

        Args:
            images: An image, or several that become pixels of one size.

        Returns:
            Pixels (B, C, H, W), float32.

        Raises:
            ImageError: An image is bad; the message names it, and its index among several. Or the
                images become pixels of different sizes, as without a crop they may.
        """
        if is_one_image(images):
            return self.to_float(images)[None]  # type: ignore[arg-type]
        read, items = partial(self.to_float, warn=WarnOnce()), iter_images(images)
        rows = prefetch_map(items, read, _raise_with_index, batch_size=AT_ONCE)
        pixels = [row for row in rows if row is not None]
        if not pixels:
            raise ImageError("no images: expected one or more")
        shapes = {tuple(p.shape[1:]) for p in pixels}
        if len(shapes) != 1:
            raise ImageError(
                f"{len(pixels)} images became pixels of {len(shapes)} sizes: give them one by one "
                "(packed() of the model takes the pixels), or set crop_size"
            )
        return torch.stack(pixels)

    def to_float(self, image: ImageLike, warn: Warn = log_image_warning) -> torch.Tensor:
        """Preprocess one image.

        Args:
            image: An image in any form that decode.py reads.
            warn: Called with a line of text where an image is readable but probably misread.

        Returns:
            Pixels (C, H, W), float32.

        Raises:
            ImageError: The image is bad, or its values do not fit their range.
        """
        return self._normalize(self._resize_crop(image, warn))

    def to_uint8_or_float(self, image: ImageLike, warn: Warn = log_image_warning) -> torch.Tensor:
        """Preprocess one image for a FastViT, which normalises uint8 pixels itself.

        Args:
            image: As for to_float().
            warn: As for to_float().

        Returns:
            Pixels, (C, H, W), uint8 if normalisation is all that is left to do, else as to_float().

        Raises:
            ImageError: As to_float().
        """
        array = self._resize_crop(image, warn)
        if array.dtype == np.uint8 and not self.float_resize:
            return torch.from_numpy(array).permute(2, 0, 1)
        return self._normalize(array)

    def decode_planes(self, image: ImageLike, warn: Warn = log_image_warning) -> list[Image.Image]:
        """Decode one image, upright and in its own size.

        Args:
            image: As for to_float().
            warn: As for to_float().

        Returns:
            Planes, as decode() returns them.

        Raises:
            ImageError: As to_float().
        """
        return decode(image, self.in_channels, self._depth_options(warn))

    def _depth_options(self, warn: Warn) -> DepthOptions:
        return DepthOptions(self.levels, self.raw_values, self.rescale_factor, warn)

    def _decode(self, image: ImageLike, warn: Warn) -> tuple[list[Image.Image], tuple[int, int]]:
        """Decode one image, as a draft if so set; return also its own (height, width)."""
        full: list[tuple[int, int]] = []

        def least_sides(height: int, width: int) -> tuple[int, int]:
            full.append((height, width))
            down, across = self._resized_sides(height, width)
            return math.ceil(down * (self.draft or 1)), math.ceil(across * (self.draft or 1))

        least = None if self.draft is None else least_sides
        planes = decode(image, self.in_channels, self._depth_options(warn), least)
        # The resized sides are those of the whole image: a fraction of it is rounded.
        return planes, full[0] if full else (planes[0].height, planes[0].width)

    def resize_crop(self, image: ImageLike, warn: Warn = log_image_warning) -> npt.NDArray[Any]:
        """Resize one image by Pillow, also where float_resize is set, and crop it.

        Args:
            image: As for to_float().
            warn: As for to_float().

        Returns:
            (H, W, C) in 0..255, uint8 or float32.

        Raises:
            ImageError: As to_float().
        """
        return replace(self, float_resize=False)._resize_crop(image, warn)

    def _normalize(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Map the result of _resize_crop() to pixels (C, H, W) float32."""
        if self.float_resize:  # already rescaled
            pixels = normalize_values(array, None, self.image_mean, self.image_std)
            return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return torch.from_numpy(
            normalize_image(array, self.rescale_factor, self.image_mean, self.image_std)
        )

    def _resize_crop(self, image: ImageLike, warn: Warn) -> npt.NDArray[Any]:
        """Return one image resized and cropped, (H, W, C); with float_resize also rescaled."""
        planes, (height, width) = self._decode(image, warn)
        new = self._resized_sides(height, width)
        if new != (height, width) and (new[0] * new[1] > MAX_PIXELS or 0 in new):
            raise ImageError(
                f"{describe_image(image)} of {height}x{width} pixels (height x width) would become "
                f"{new[0]}x{new[1]}: expected at most {MAX_PIXELS} pixels; cut it up"
            )
        # Pillow resizes plane by plane: float32 planes of deep images, or one RGB image.
        if not self.float_resize:
            part, resample = self._part(new), Image.Resampling(self.resample)
            planes = [resize_part(plane, new, part, resample) for plane in planes]
        array = np.concatenate([np.atleast_3d(np.asarray(p)) for p in planes], axis=2)
        if self.float_resize:
            array = resize_float(array, new, self.rescale_factor or 1.0, self.resample)
        if self.crop_size is not None:
            array = center_crop(array, self.crop_size, self.crop_rounding, self.fill)
        return array

    def _part(self, sides: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of a resized image that the crop is made of."""
        crop = self.crop_size or sides
        height, width = (min(pair) for pair in zip(crop, sides, strict=True))
        top, left = (
            crop_start(have - want, self.crop_rounding)
            for have, want in zip(sides, (height, width), strict=True)
        )
        return top, left, height, width

    def _resized_sides(self, height: int, width: int) -> tuple[int, int]:
        return resized_sides(
            (height, width),
            size=self.size,
            fit=self.fit,
            shortest_edge=self.shortest_edge,
            multiple_of=self.multiple_of,
            max_patches=self.max_patches,
        )


def uint8_affine(processor: object | None) -> Uint8Affine | None:
    """Return the affine map of a preprocessing from uint8 pixels to normalised ones.

    Args:
        processor: The model's preprocessing, if any.

    Returns:
        None if there is no preprocessing, or if it does more than that to uint8 pixels.
    """
    if not isinstance(processor, ImageProcessor) or processor.float_resize:
        return None
    factor = 1.0 if processor.rescale_factor is None else processor.rescale_factor
    mean = processor.image_mean or (0.0,) * processor.in_channels
    std = processor.image_std or (1.0,) * processor.in_channels
    return Uint8Affine(
        tuple(factor / s for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
    )
