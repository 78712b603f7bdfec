"""Images to pixels: resize, crop, rescale, normalise, by the checkpoint's rule.

The rule is read from the checkpoint (rules/ says from which files) and the arithmetic is that of
transformers' Pillow-backed processors, bit for bit, and with crop_rounding="even" that of timm and
open_clip: Pillow resizes 8-bit levels, which are then scaled in float64, rounded to float32 and
normalised in float32. With float_resize it is that of transformers' DINOv3: levels are scaled in
float32, resized by torch, then normalised. Deeper pictures and floats are resized as float32 planes
by Pillow's same filters, and nothing is rounded to 8 bits: see depth.py.

Shapes: H W height and width in pixels, C channels, B images. Levels are 0..255.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vitlib.config import is_number, to_pair
from vitlib.errors import ConfigError, ImageError
from vitlib.image import configs
from vitlib.image.configs import RESAMPLE
from vitlib.image.decode import (
    MAX_PIXELS,
    ImageLike,
    decode,
    describe_image,
    is_one_image,
    iter_images,
)
from vitlib.image.depth import DepthOptions, Levels, WarnOnce, is_8_bit_factor, log_image_warning
from vitlib.image.pixels import (
    Uint8Affine,
    center_crop,
    crop_start,
    normalize_image,
    normalize_values,
    resize_float,
    resized_sides,
)
from vitlib.source.locate import Source


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """How an image becomes pixels; call it with one image or a list of them.

    An image is whatever decode.py reads: a path, encoded bytes, an open binary file, a PIL image,
    an array or a tensor; what becomes of grayscale, palette, CMYK, alpha and EXIF is said there,
    and of other depths than 8 bits in depth.py.
    """

    size: tuple[int, int] | None = None  # resize to this (height, width): see fit
    shortest_edge: int | None = None  # or: resize to this shorter side, keeping the shape
    # What size means: the very sides; or, keeping the shape, sides that cover it or lie within it,
    # as timm does for oblong models and with crop_mode="border".
    fit: str = "squash"  # or "cover", "contain"
    multiple_of: tuple[int, int] | None = None  # with shortest_edge: sides rounded to these
    resample: int = 2  # Pillow's code of the filter
    float_resize: bool = False  # rescale first and let torch resize the floats, as DINOv3 does
    crop_size: tuple[int, int] | None = None  # then cut this out of the middle
    # Half a pixel off the middle: "floor" as transformers' Pillow processors do, "even" as
    # torchvision's CenterCrop (timm, open_clip, DINO), "zero" as transformers on tensors (DINOv3).
    crop_rounding: str = "floor"
    fill: tuple[int, ...] | None = None  # the level, a channel each, around what is short; None: 0
    rescale_factor: float | None = 1 / 255  # then multiply; None: leave levels
    image_mean: tuple[float, ...] | None = None  # then subtract and divide, a channel each
    image_std: tuple[float, ...] | None = None
    in_channels: int = 3
    # Of pictures deeper than 8 bits and of floats: the value of white, where black is 0, or a
    # window (black, white), beyond which values are clipped; None: what the file or dtype says.
    levels: Levels = None

    def __post_init__(self) -> None:
        for name, value in configs.check_fields(self._fields()).items():
            object.__setattr__(self, name, value)

    @property
    def raw_values(self) -> bool:
        """Whether deeper pictures and floats keep the numbers that they have in the file: where the
        rule has another factor than for 8-bit levels, or none, or other than 1 or 3 channels."""
        return self.levels is None and (
            self.in_channels not in (1, 3) or not is_8_bit_factor(self.rescale_factor)
        )

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> ImageProcessor:
        """The rule of a hub id or folder, or beside a weights file, whichever library wrote it.

        It is in preprocessor_config.json, processor_config.json, timm's config.json or
        open_clip_config.json: the first that holds one.

        Raises SourceError where there is none to read, ConfigError where it cannot be followed.
        """
        return cls.from_source(
            Source(
                source,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )

    @classmethod
    def from_source(cls, source: Source) -> ImageProcessor:
        """The same, from a source already found."""
        try:
            found = configs.find_fields(source.json)
            if found is not None:
                return cls(**found)
        except ConfigError as error:
            raise ConfigError(f"{source.name!r}: {error}") from error
        raise ConfigError(
            f"no preprocessor_config.json in {source.name!r}, nor a rule of timm's or open_clip's: "
            "put one there, or give image_processor=ImageProcessor(...)"
        )

    @classmethod
    def from_dict(cls, rule: Mapping[str, Any], model_type: object = None) -> ImageProcessor:
        """A preprocessor_config.json of any age as a rule; model_type serves if it names no class.

        Raises ConfigError for what vitlib does not do, or cannot be done.
        """
        return cls(**configs.hf_fields(rule, model_type))

    @classmethod
    def from_timm(cls, rule: Mapping[str, Any]) -> ImageProcessor:
        """timm's `pretrained_cfg` as a rule. Raises ConfigError for what cannot be followed."""
        return cls(**configs.timm_fields(rule))

    @classmethod
    def from_openclip(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """An open_clip_config.json as a rule. Raises ConfigError for what cannot be followed."""
        return cls(**configs.openclip_fields(config))

    @classmethod
    def from_profile(
        cls, profile: str, family: str, image_size: int | tuple[int, int]
    ) -> ImageProcessor:
        """What a library does with a family where no file says it: see configs/profiles.py."""
        return cls(**configs.profile_fields(profile, family, image_size))

    @property
    def equal_channels(self) -> bool:
        """Whether every channel is normalised alike."""
        return len(set(self.image_mean or ())) < 2 and len(set(self.image_std or ())) < 2

    def with_image_size(
        self,
        image_size: tuple[int, int] | Literal["keep"],
        patch_size: tuple[int, int] | None = None,
    ) -> ImageProcessor:
        """The rule for pixels of another (height, width); a crop keeps its share of the image.

        "keep": the whole image in its own shape, its shorter side what the rule's was, both sides
        rounded to whole patches of patch_size (height, width). Raises ConfigError without that.
        """
        if image_size == "keep":
            if patch_size is None:
                raise ConfigError("image_size='keep' rounds to whole patches: give patch_size")
            sides = self.crop_size or self.size or (self.shortest_edge or max(patch_size),)
            return replace(
                self, size=None, fit="squash", crop_size=None, fill=None, shortest_edge=min(sides),
                multiple_of=patch_size,
            )  # fmt: skip
        if self.multiple_of is not None:
            return replace(self, shortest_edge=min(image_size))
        if self.shortest_edge is None and self.crop_size is None:
            return replace(self, size=image_size)
        crop = self.crop_size or (self.shortest_edge or 1,) * 2
        grow = max(image_size[0] / crop[0], image_size[1] / crop[1])
        changes: dict[str, Any] = {"crop_size": image_size}
        if self.shortest_edge is not None:
            changes["shortest_edge"] = max(round(self.shortest_edge * grow), *image_size)
        if self.size is not None:
            changes["size"] = tuple(round(side * grow) for side in self.size)
        return replace(self, **changes)

    def with_squash(self) -> ImageProcessor:
        """The rule with the whole photo resized to its sides (height, width), nothing cut off."""
        sides = self.crop_size or self.size or to_pair("shortest_edge", self.shortest_edge)
        kept = replace(self, fit="squash", shortest_edge=None, multiple_of=None, fill=None)
        return replace(kept, size=sides, crop_size=None)

    def with_channels(
        self, in_channels: int, band_map: Sequence[int | None] | None = None
    ) -> ImageProcessor:
        """The rule for another number of channels: each new one is normalised as the old one it
        stands for, or, where it stands for all or none, by the mean of mean and of std."""
        old = self.in_channels

        def moved(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
            if values is None:
                return None
            mean = sum(values) / old if len(set(values)) > 1 else values[0]
            if band_map is not None:
                return tuple(mean if band is None else values[band] for band in band_map)
            return tuple(mean if in_channels == 1 else values[i % old] for i in range(in_channels))

        fill = moved(self.fill)
        return replace(
            self,
            in_channels=in_channels,
            fill=None if fill is None else tuple(round(level) for level in fill),
            image_mean=moved(self.image_mean),
            image_std=moved(self.image_std),
        )

    def visible_box(
        self, height: int, width: int, patch_size: tuple[int, int] = (1, 1)
    ) -> tuple[float, float, float, float]:
        """What of an image of these sides becomes pixels: (top, left, bottom, right), in its own
        pixels; beyond its edges where the rule fills around it.

        patch_size: of these pixels, what whole patches of this (height, width) cover.
        """
        new = self._resized(height, width)
        cut = self.crop_size or new
        y, x = (crop_start(n - c, self.crop_rounding) for n, c in zip(new, cut, strict=True))
        h, w = (c // p * p for c, p in zip(cut, patch_size, strict=True))
        down, across = height / new[0], width / new[1]
        return y * down, x * across, (y + h) * down, (x + w) * across

    def to_dict(self) -> dict[str, Any]:
        """The rule as a preprocessor_config.json that transformers 4 and 5 read."""
        return configs.hf_config(self._fields())

    def to_timm(self) -> dict[str, Any]:
        """The rule as keys of timm's `pretrained_cfg`."""
        return configs.timm_config(self._fields())

    def to_openclip(self) -> dict[str, Any]:
        """The rule as open_clip's `preprocess_cfg`."""
        return configs.openclip_config(self._fields())

    def unsupported_fields(self, layout: str) -> list[str]:
        """What of the rule the file of "hf", "timm" or "openclip" cannot hold, a line each."""
        return configs.unsupported_fields(self._fields(), layout)

    def _fields(self) -> configs.Fields:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def describe(self) -> str:
        """The rule in one line."""
        steps = []
        if self.size is not None:
            how = {"squash": "", "cover": "cover ", "contain": "fit into "}[self.fit]
            steps.append(f"resize to {how}{self.size[0]}x{self.size[1]}")
        if self.shortest_edge is not None:
            steps.append(f"resize the shorter edge to {self.shortest_edge}")
        if self.multiple_of is not None:
            steps[0] += f", sides to multiples of {self.multiple_of[0]}x{self.multiple_of[1]}"
        if steps:
            steps[0] += f" ({RESAMPLE[self.resample]}{', of floats' * self.float_resize})"
        if self.crop_size is not None:
            steps.append(f"crop {self.crop_size[0]}x{self.crop_size[1]}")
        if self.rescale_factor is not None:
            steps.append(f"times {self.rescale_factor:.6g}")
        if self.image_mean is not None and self.image_std is not None:
            mean, std = (" ".join(f"{v:g}" for v in x) for x in (self.image_mean, self.image_std))
            steps.append(f"minus {mean}, over {std}")
        if self.levels is not None:
            levels = (0, self.levels) if is_number(self.levels) else self.levels
            steps.insert(0, f"deeper than 8 bits: {levels[0]:g} is black, {levels[1]:g} white")  # type: ignore[index]
        return "; ".join(steps) or "none"

    def __call__(self, images: ImageLike | Iterable[ImageLike]) -> torch.Tensor:
        """One image or several -> pixels (B, C, H, W), float32.

        Raises ImageError for what is no image, names it, and where there are several its position;
        also where images of different sizes come out, as they do under a rule without a crop.
        """
        if is_one_image(images):
            return self.to_float(images)[None]  # type: ignore[arg-type]
        pixels, once = [], WarnOnce()
        for index, image in enumerate(iter_images(images)):
            try:
                pixels.append(self.to_float(image, once))
            except ImageError as error:
                raise ImageError(f"image {index}: {error}") from error
        if not pixels:
            raise ImageError("no images: expected one or more")
        shapes = {tuple(p.shape[1:]) for p in pixels}
        if len(shapes) != 1:
            raise ImageError(
                f"{len(pixels)} images became pixels of {len(shapes)} sizes: give them one by one, "
                "or set crop_size"
            )
        return torch.stack(pixels)

    def to_float(
        self, image: ImageLike, warn: Callable[[str], None] = log_image_warning
    ) -> torch.Tensor:
        """One image -> (C, H, W) float32.

        Args:
            image: whatever image/decode.py reads.
            warn: called with one line of a picture that was probably meant otherwise.

        Raises:
            ImageError: the image, by name, is none, or its numbers do not fit their range.
        """
        return self._pixels(self._resize_crop(image, warn))

    def to_uint8_or_float(
        self, image: ImageLike, warn: Callable[[str], None] = log_image_warning
    ) -> torch.Tensor:
        """One image -> (C, H, W): uint8 levels where all that is left is to normalise, which a
        FastViT does itself (forward_uint8); else pixels(). Arguments and errors as there."""
        levels = self._resize_crop(image, warn)
        if levels.dtype == np.uint8 and not self.float_resize:
            return torch.from_numpy(levels).permute(2, 0, 1)
        return self._pixels(levels)

    def decode_planes(
        self, image: ImageLike, warn: Callable[[str], None] = log_image_warning
    ) -> list[Image.Image]:
        """One image as decode() gives it, upright and of its own size. Arguments and errors as for
        pixels()."""
        reading = DepthOptions(self.levels, self.raw_values, self.rescale_factor, warn)
        return decode(image, self.in_channels, reading)

    def resize_crop(
        self, image: ImageLike, warn: Callable[[str], None] = log_image_warning
    ) -> npt.NDArray[Any]:
        """One image, resized by Pillow and cropped: (H, W, C) levels, uint8 or float32. Arguments
        and errors as for pixels()."""
        return replace(self, float_resize=False)._resize_crop(image, warn)

    def _pixels(self, levels: npt.NDArray[Any]) -> torch.Tensor:
        """What _resize_crop() gives -> (C, H, W) float32."""
        if self.float_resize:  # scaled already
            pixels = normalize_values(levels, None, self.image_mean, self.image_std)
            return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return torch.from_numpy(
            normalize_image(levels, self.rescale_factor, self.image_mean, self.image_std)
        )

    def _resize_crop(self, image: ImageLike, warn: Callable[[str], None]) -> npt.NDArray[Any]:
        """One image, resized and cropped: (H, W, C) levels, with float_resize times the factor."""
        planes = self.decode_planes(image, warn)
        width, height = planes[0].size
        new = self._resized(height, width)
        if new != (height, width) and (new[0] * new[1] > MAX_PIXELS or 0 in new):
            raise ImageError(
                f"{describe_image(image)} of {height}x{width} pixels (height x width) would become "
                f"{new[0]}x{new[1]}: expected at most {MAX_PIXELS} pixels; cut it up"
            )
        if new != (height, width) and not self.float_resize:
            resample = Image.Resampling(self.resample)
            planes = [plane.resize((new[1], new[0]), resample) for plane in planes]
        levels = np.concatenate([np.atleast_3d(np.asarray(p)) for p in planes], axis=2)
        if self.float_resize:
            levels = resize_float(levels, new, self.rescale_factor or 1.0, self.resample)
        if self.crop_size is not None:
            levels = center_crop(levels, self.crop_size, self.crop_rounding, self.fill)
        return levels

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return resized_sides(
            (height, width),
            size=self.size,
            fit=self.fit,
            shortest_edge=self.shortest_edge,
            multiple_of=self.multiple_of,
        )


def uint8_affine(processor: object | None) -> Uint8Affine | None:
    """Return the affine map of a preprocessing from uint8 pixels to normalised ones.

    Args:
        processor: The model's preprocessing, if any.

    Returns:
        None where there is no preprocessing, or where it does more than that to uint8 pixels.
    """
    if not isinstance(processor, ImageProcessor) or processor.float_resize:
        return None
    factor = 1.0 if processor.rescale_factor is None else processor.rescale_factor
    mean = processor.image_mean or (0.0,) * processor.in_channels
    std = processor.image_std or (1.0,) * processor.in_channels
    return Uint8Affine(
        tuple(factor / s for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
    )
