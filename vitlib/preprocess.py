"""Images to pixels: resize, crop, rescale, normalise, by the checkpoint's rule.

The rule is read from the checkpoint (rules/ says from which files) and the arithmetic is that of
transformers' Pillow-backed processors, bit for bit, and with crop_rounding="even" that of timm and
open_clip: Pillow resizes 8-bit levels, which are then scaled in float64, rounded to float32 and
normalised in float32. With float_resize it is that of transformers' DINOv3: levels are scaled in
float32, resized by torch, then normalised.

Shapes: H W height and width in pixels, C channels, B images. Levels are 0..255.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional as F

from vitlib import rules
from vitlib.config import as_pair, is_number
from vitlib.errors import ConfigError, ImageError
from vitlib.images import MAX_PIXELS, ImageLike, decode, is_one_image, name_of
from vitlib.levels import center_crop, crop_start, level_table, scale
from vitlib.rules import RESAMPLE
from vitlib.source import Source

_TORCH_MODES = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """How an image becomes pixels; call it with one image or a list of them.

    An image is whatever images.py reads: a path, encoded bytes, a PIL image, an array or a tensor;
    what becomes of grayscale, palette, CMYK, alpha, 16 bits, floats and EXIF is said there.
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

    def __post_init__(self) -> None:
        for name in ("size", "crop_size", "multiple_of"):
            if getattr(self, name) is not None:
                height, width = as_pair(name, getattr(self, name))
                object.__setattr__(self, name, (height, width))
                if height * width > MAX_PIXELS:
                    raise ConfigError(
                        f"{name}={height}x{width}: expected at most {MAX_PIXELS} pixels in all"
                    )
        if self.shortest_edge is not None:
            as_pair("shortest_edge", self.shortest_edge)
            if self.size is not None:
                raise ConfigError("size and shortest_edge are two ways to resize: give one")
        if self.multiple_of is not None and (self.shortest_edge is None or self.crop_size):
            raise ConfigError("multiple_of rounds what shortest_edge gives, with no crop_size")
        if type(self.resample) is not int or self.resample not in RESAMPLE:
            raise ConfigError(f"resample={self.resample!r}: expected one of {RESAMPLE}")
        if (self.image_mean is None) != (self.image_std is None):
            raise ConfigError("image_mean and image_std go together")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is not None and not (
                len(values) == self.in_channels and all(map(is_number, values))
            ):
                raise ConfigError(f"{name}={values}: expected {self.in_channels} numbers")
        if self.image_std is not None and not all(self.image_std):
            raise ConfigError(f"image_std={self.image_std}: expected no zero")
        if self.rescale_factor is not None and not is_number(self.rescale_factor):
            raise ConfigError(f"rescale_factor={self.rescale_factor!r}: expected a number")
        self._check_names()

    def _check_names(self) -> None:
        for name, known in (("fit", rules.FITS), ("crop_rounding", rules.CROP_ROUNDINGS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected one of {known}")
        if self.fit != "squash" and (self.size is None or self.crop_size is None):
            raise ConfigError(f"fit={self.fit!r} leaves the shape: give size and crop_size")
        if self.fill is not None and not (
            len(self.fill) == self.in_channels
            and all(type(level) is int and 0 <= level <= 255 for level in self.fill)
        ):
            raise ConfigError(f"fill={self.fill}: expected {self.in_channels} levels in 0..255")
        if self.float_resize and (
            self.resample not in _TORCH_MODES or self.rescale_factor is None or self.fill
        ):
            raise ConfigError(
                f"float_resize with resample={self.resample}, rescale_factor={self.rescale_factor} "
                f"and fill={self.fill}: expected resample 2 or 3, a factor and no fill"
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
            found = rules.find(source.json)
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
        return cls(**rules.hf_fields(rule, model_type))

    @classmethod
    def from_timm(cls, rule: Mapping[str, Any]) -> ImageProcessor:
        """timm's `pretrained_cfg` as a rule. Raises ConfigError for what cannot be followed."""
        return cls(**rules.timm_fields(rule))

    @classmethod
    def from_openclip(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """An open_clip_config.json as a rule. Raises ConfigError for what cannot be followed."""
        return cls(**rules.openclip_fields(config))

    @classmethod
    def from_profile(
        cls, profile: str, family: str, image_size: int | tuple[int, int]
    ) -> ImageProcessor:
        """What a library does with a family where no file says it: see rules/profiles.py."""
        return cls(**rules.profile_fields(profile, family, image_size))

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

    def squashed(self) -> ImageProcessor:
        """The rule with the whole photo resized to its sides (height, width), nothing cut off."""
        sides = self.crop_size or self.size or as_pair("shortest_edge", self.shortest_edge)
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

    def shown(
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
        return rules.hf_rule(self._fields())

    def to_timm(self) -> dict[str, Any]:
        """The rule as keys of timm's `pretrained_cfg`."""
        return rules.timm_rule(self._fields())

    def to_openclip(self) -> dict[str, Any]:
        """The rule as open_clip's `preprocess_cfg`."""
        return rules.openclip_rule(self._fields())

    def lost(self, layout: str) -> list[str]:
        """What of the rule the file of "hf", "timm" or "openclip" cannot hold, a line each."""
        return rules.lost(self._fields(), layout)

    def _fields(self) -> rules.Fields:
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
        return "; ".join(steps) or "none"

    def __call__(self, images: ImageLike | Iterable[ImageLike]) -> torch.Tensor:
        """One image or several -> pixels (B, C, H, W), float32.

        Raises ImageError for what is no image, names it, and where there are several its position;
        also where images of different sizes come out, as they do under a rule without a crop.
        """
        if is_one_image(images):
            return self.pixels(images)[None]  # type: ignore[arg-type]
        pixels = []
        for index, image in enumerate(images):  # type: ignore[arg-type]
            try:
                pixels.append(self.pixels(image))
            except ImageError as error:
                raise ImageError(f"image {index}: {error}") from error
        shapes = {tuple(p.shape[1:]) for p in pixels}
        if len(shapes) != 1:
            raise ImageError(
                f"{len(pixels)} images became pixels of {len(shapes)} sizes: give them one by one, "
                "or set crop_size"
            )
        return torch.stack(pixels)

    def pixels(self, image: ImageLike) -> torch.Tensor:
        """One image -> (C, H, W) float32. Raises ImageError, naming the image, where it is none."""
        levels = self._cut(image)
        return torch.from_numpy(levels if self.float_resize else self._normalise(levels))

    def ready(self, image: ImageLike) -> torch.Tensor:
        """One image -> (C, H, W): uint8 levels where all that is left is to normalise, which a
        FastViT does itself (forward_levels); else pixels(). Errors as there."""
        levels = self._cut(image)
        if levels.dtype == np.uint8:
            return torch.from_numpy(levels).permute(2, 0, 1)
        return torch.from_numpy(levels if self.float_resize else self._normalise(levels))

    def _cut(self, image: ImageLike) -> npt.NDArray[Any]:
        """One image, resized and cropped: (H, W, C) levels; pixels (C, H, W) with float_resize."""
        planes = decode(image, self.in_channels)
        width, height = planes[0].size
        new = self._resized(height, width)
        if new != (height, width) and (new[0] * new[1] > MAX_PIXELS or 0 in new):
            raise ImageError(
                f"{name_of(image)} of {height}x{width} pixels (height x width) would become "
                f"{new[0]}x{new[1]}: expected at most {MAX_PIXELS} pixels; cut it up"
            )
        if new != (height, width) and not self.float_resize:
            resample = Image.Resampling(self.resample)
            planes = [plane.resize((new[1], new[0]), resample) for plane in planes]
        levels = np.concatenate([np.atleast_3d(np.asarray(p)) for p in planes], axis=2)
        if self.float_resize:
            return self._float_pixels(levels, new)
        if self.crop_size is not None:
            levels = center_crop(levels, self.crop_size, self.crop_rounding, self.fill)
        return levels

    def _float_pixels(
        self, levels: npt.NDArray[Any], new: tuple[int, int]
    ) -> npt.NDArray[np.float32]:
        """(H, W, C) levels -> (C, h, w) float32, rescaled before they are resized."""
        factor = 1.0 if self.rescale_factor is None else self.rescale_factor
        scaled = torch.from_numpy(levels).permute(2, 0, 1).contiguous() * factor
        if new != levels.shape[:2]:
            mode = _TORCH_MODES[self.resample]
            scaled = F.interpolate(
                scaled[None], new, mode=mode, align_corners=False, antialias=True
            )[0]
        pixels = scaled.permute(1, 2, 0).numpy()
        if self.crop_size is not None:
            pixels = center_crop(pixels, self.crop_size, self.crop_rounding)
        pixels = scale(pixels, None, self.image_mean, self.image_std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None and self.fit == "squash":
            return self.size
        if self.size is not None:
            # As timm's ResizeKeepRatio counts: both sides are rounded, and none is truncated.
            ratios = (height / self.size[0], width / self.size[1])
            ratio = min(ratios) if self.fit == "cover" else max(ratios)
            return round(height / ratio), round(width / ratio)
        if self.shortest_edge is None:
            return height, width
        short = self.shortest_edge
        if self.multiple_of is not None:
            ratio = short / min(height, width)
            sides = zip((height, width), self.multiple_of, strict=True)
            down, across = (max(round(side * ratio / step), 1) * step for side, step in sides)
            return down, across
        long = int(short * max(height, width) / min(height, width))
        return (long, short) if height >= width else (short, long)

    def _normalise(self, levels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """(H, W, C) levels -> (C, H, W) float32."""
        how = (self.rescale_factor, self.image_mean, self.image_std)
        if levels.dtype != np.uint8:
            return np.ascontiguousarray(scale(levels, *how).transpose(2, 0, 1))
        table = level_table(self.in_channels, *how)
        pixels = np.empty((levels.shape[2], *levels.shape[:2]), dtype=np.float32)
        for channel, values in enumerate(table):
            np.take(values, levels[:, :, channel], out=pixels[channel], mode="clip")
        return pixels
