"""Images to pixels: resize, crop, rescale, normalise, by the checkpoint's rule.

The rule is read from the checkpoint's preprocessor_config.json and the arithmetic is that of
transformers' Pillow-backed processors, bit for bit: Pillow resizes 8-bit levels, which are then
scaled in float64, rounded to float32 and normalised in float32.

Shapes: H W height and width in pixels, C channels, B images. Levels are 0..255.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vitlib.config import as_pair, is_number
from vitlib.errors import ConfigError, ImageError
from vitlib.images import MAX_PIXELS, ImageLike, decode, is_one_image, name_of
from vitlib.source import Source

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# What transformers' classes take where preprocessor_config.json leaves a key out, and whether a
# plain number means a square ("squash") or the shorter edge. The key wins wherever it is there.
_HALF, _CLIP_MEAN = [0.5] * 3, [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_COMMON = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_CLASSES: dict[str, dict[str, Any]] = {
    "ViT": _COMMON | {"size": 224, "square": True, "resample": 2, "mean": _HALF, "std": _HALF},
    "DeiT": _COMMON
    | {"size": 256, "square": True, "resample": 3, "crop": 224, "mean": _HALF, "std": _HALF},
    "Bit": _COMMON
    | {"size": 224, "square": False, "resample": 3, "crop": 224}
    | {"mean": _CLIP_MEAN, "std": _CLIP_STD},
    "ConvNext": _COMMON
    | {"size": 384, "square": False, "resample": 3, "mean": _HALF, "std": _HALF},
}
_CLASSES["CLIP"] = _CLASSES["Bit"]
# The class that AutoImageProcessor takes for a model_type where the file names none.
_CLASS_OF_MODEL = {"vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit"}


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """How an image becomes pixels; call it with one image or a list of them.

    An image is whatever images.py reads: a path, encoded bytes, a PIL image, an array or a tensor;
    what becomes of grayscale, palette, CMYK, alpha, 16 bits, floats and EXIF is said there.
    """

    size: tuple[int, int] | None = None  # resize to this (height, width), whatever the shape
    shortest_edge: int | None = None  # or: resize to this shorter side, keeping the shape
    resample: int = 2  # Pillow's code of the filter
    crop_size: tuple[int, int] | None = None  # then cut this out of the middle; zeros where short
    rescale_factor: float | None = 1 / 255  # then multiply; None: leave levels
    image_mean: tuple[float, ...] | None = None  # then subtract and divide, a channel each
    image_std: tuple[float, ...] | None = None
    in_channels: int = 3

    def __post_init__(self) -> None:
        for name in ("size", "crop_size"):
            if getattr(self, name) is not None:
                height, width = as_pair(name, getattr(self, name))
                object.__setattr__(self, name, (height, width))
                if height * width > MAX_PIXELS:
                    raise ConfigError(f"{name}={height}x{width}: expected at most {MAX_PIXELS}")
        if self.shortest_edge is not None:
            as_pair("shortest_edge", self.shortest_edge)
            if self.size is not None:
                raise ConfigError("size and shortest_edge are two ways to resize: give one")
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
        """The rule in the preprocessor_config.json of a hub id or folder, or beside a weights file.

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
        rule = source.json("preprocessor_config.json")
        if rule is None:
            raise ConfigError(
                f"no preprocessor_config.json in {source.name!r}: put one there, or give "
                "image_processor=ImageProcessor(...)"
            )
        model_type = (source.json("config.json") or {}).get("model_type")
        try:
            return cls.from_dict(rule, model_type)
        except ConfigError as error:
            raise ConfigError(f"{source.name!r}: preprocessor_config.json: {error}") from error

    @classmethod
    def from_dict(cls, rule: Mapping[str, Any], model_type: object = None) -> ImageProcessor:
        """A preprocessor_config.json of any age as a rule; model_type serves if it names no class.

        Raises ConfigError for what vitlib does not do, or cannot be done.
        """
        name, default = _class_of(rule, model_type)

        def get(key: str, other: str | None = None) -> Any:
            value = rule.get(key)
            return default.get(other or key) if value is None else value

        size, shortest_edge, crop_size = None, None, None
        if get("do_resize"):
            size, shortest_edge = _read_size(get("size"), square=default["square"])
        if get("do_center_crop", "crop"):
            crop_size = _read_pair("crop_size", get("crop_size", "crop") or 224)
        if name == "ConvNext" and shortest_edge is not None:
            if crop_size is not None:
                raise ConfigError("do_center_crop is true beside ConvNext's own crop")
            size, shortest_edge, crop_size = _convnext(shortest_edge, rule.get("crop_pct"))
        if rule.get("do_pad"):
            raise ConfigError("do_pad is true, which vitlib does not do")
        mean, std = (get("image_mean", "mean"), get("image_std", "std"))
        mean, std = (list(v) if isinstance(v, list | tuple) else [v] * 3 for v in (mean, std))
        normalize = bool(get("do_normalize"))
        return cls(
            size=size,
            shortest_edge=shortest_edge,
            resample=get("resample"),
            crop_size=crop_size,
            rescale_factor=get("rescale_factor") if get("do_rescale") else None,
            image_mean=tuple(mean) if normalize else None,
            image_std=tuple(std) if normalize else None,
            in_channels=len(mean) if normalize else 3,
        )

    @property
    def equal_channels(self) -> bool:
        """Whether every channel is normalised alike."""
        return len(set(self.image_mean or ())) < 2 and len(set(self.image_std or ())) < 2

    def with_image_size(self, image_size: tuple[int, int]) -> ImageProcessor:
        """The rule for pixels of another (height, width); a crop keeps its share of the image."""
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

        return replace(
            self,
            in_channels=in_channels,
            image_mean=moved(self.image_mean),
            image_std=moved(self.image_std),
        )

    def to_dict(self) -> dict[str, Any]:
        """The rule as a preprocessor_config.json that transformers 4 and 5 read."""
        kind = "ViT" if self.crop_size is None else "DeiT" if self.size is not None else "Bit"
        rule: dict[str, Any] = {
            "image_processor_type": f"{kind}ImageProcessor",
            "do_resize": self.size is not None or self.shortest_edge is not None,
            "resample": self.resample,
            "do_center_crop": self.crop_size is not None,
            "do_rescale": self.rescale_factor is not None,
            "do_normalize": self.image_mean is not None,
        }
        if self.shortest_edge is not None:
            rule["size"] = {"shortest_edge": self.shortest_edge}
        elif self.size is not None:
            rule["size"] = {"height": self.size[0], "width": self.size[1]}
        if self.crop_size is not None:
            rule["crop_size"] = {"height": self.crop_size[0], "width": self.crop_size[1]}
        if self.rescale_factor is not None:
            rule["rescale_factor"] = self.rescale_factor
        if self.image_mean is not None and self.image_std is not None:
            rule |= {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}
        return rule

    def describe(self) -> str:
        """The rule in one line."""
        steps = []
        if self.size is not None:
            steps.append(f"resize to {self.size[0]}x{self.size[1]}")
        if self.shortest_edge is not None:
            steps.append(f"resize the shorter edge to {self.shortest_edge}")
        if steps:
            steps[0] += f" ({RESAMPLE[self.resample]})"
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
        planes = decode(image, self.in_channels)
        width, height = planes[0].size
        new = self._resized(height, width)
        if new != (height, width):
            if new[0] * new[1] > MAX_PIXELS or 0 in new:
                raise ImageError(
                    f"{name_of(image)} of {height}x{width} pixels (height x width) would become "
                    f"{new[0]}x{new[1]}: expected at most {MAX_PIXELS} pixels; cut it up"
                )
            resample = Image.Resampling(self.resample)
            planes = [plane.resize((new[1], new[0]), resample) for plane in planes]
        levels = np.concatenate([np.atleast_3d(np.asarray(p)) for p in planes], axis=2)
        if self.crop_size is not None:
            levels = center_crop(levels, self.crop_size)
        return torch.from_numpy(self._normalise(levels))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        if self.shortest_edge is None:
            return height, width
        short = self.shortest_edge
        long = int(short * max(height, width) / min(height, width))
        return (long, short) if height >= width else (short, long)

    def _normalise(self, levels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """(H, W, C) levels -> (C, H, W) float32."""
        how = (self.rescale_factor, self.image_mean, self.image_std)
        if levels.dtype != np.uint8:
            return np.ascontiguousarray(_scale(levels, *how).transpose(2, 0, 1))
        table = _level_table(self.in_channels, *how)
        pixels = np.empty((levels.shape[2], *levels.shape[:2]), dtype=np.float32)
        for channel, values in enumerate(table):
            np.take(values, levels[:, :, channel], out=pixels[channel], mode="clip")
        return pixels


def center_crop(levels: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """The middle of an image: (H, W, C) -> (h, w, C), with zeros around where it is too small.

    Halves are rounded as transformers does: down to find the middle, up for the border.
    """
    both = list(zip(levels.shape, size, strict=False))
    before = [-(-max(want - have, 0) // 2) for have, want in both]
    widths = [(b, max(want - have, 0) - b) for b, (have, want) in zip(before, both, strict=True)]
    if any(before):
        levels = np.pad(levels, [*widths, (0, 0)])
    # Where there is a border, the cut is at the old middle, moved by the border.
    starts = [(have - want) // 2 + b for b, (have, want) in zip(before, both, strict=True)]
    top, left = (max(start, 0) for start in starts)
    return levels[top : top + size[0], left : left + size[1]]


def _scale(
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
def _level_table(
    in_channels: int,
    rescale_factor: float | None,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> npt.NDArray[np.float32]:
    """(C, 256): what each 8-bit level of each channel becomes; exact, as nothing mixes levels."""
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], in_channels, axis=1)
    table = _scale(levels, rescale_factor, image_mean, image_std)
    return np.ascontiguousarray(table.T)


def _class_of(rule: Mapping[str, Any], model_type: object) -> tuple[str, dict[str, Any]]:
    """The transformers class a rule is for; ViT's where neither it nor the model names one."""
    named = rule.get("image_processor_type") or rule.get("feature_extractor_type")
    if named is None:
        name = _CLASS_OF_MODEL.get(str(model_type), "ViT" if model_type is None else "")
    else:
        name = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(named))
    if name not in _CLASSES:
        what = f"image_processor_type {named!r}" if named is not None else f"model {model_type!r}"
        raise ConfigError(f"{what} is not known: vitlib follows those of {', '.join(_CLASSES)}")
    return name, _CLASSES[name]


def _read_size(size: Any, *, square: bool) -> tuple[tuple[int, int] | None, int | None]:
    """`size` as any version wrote it -> (size, shortest_edge), one of them None."""
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return None, as_pair("size", size["shortest_edge"])[0]
    if isinstance(size, int) and not square:
        return None, as_pair("size", size)[0]
    return _read_pair("size", size), None


def _read_pair(name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        if set(size) != {"height", "width"}:
            raise ConfigError(f"{name} has {', '.join(map(str, size))}: expected height and width")
        size = (size["height"], size["width"])
    return as_pair(name, size)


def _convnext(
    shortest_edge: int, crop_pct: Any
) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """ConvNext's rule: below 384 a crop of this share of the shorter side, from there a squash."""
    crop_pct = 224 / 256 if crop_pct is None else crop_pct
    if not is_number(crop_pct) or not 0 < crop_pct <= 1:
        raise ConfigError(f"crop_pct={crop_pct!r}: expected a number above 0 and at most 1")
    both = (shortest_edge, shortest_edge)
    return (
        (None, int(shortest_edge / crop_pct), both) if shortest_edge < 384 else (both, None, None)
    )
