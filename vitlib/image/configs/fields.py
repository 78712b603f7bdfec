"""What the readers of rules share: the tables of names, and values checked as they are read.

A rule is a dict of ImageProcessor's fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from vitlib.errors import ConfigError

Fields: TypeAlias = dict[str, Any]
Stats: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, a channel each

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
TORCH_MODES = {2: "bilinear", 3: "bicubic"}  # the same filters as torch names them
FITS = ("squash", "cover", "contain")
CROP_ROUNDINGS = ("floor", "even", "zero")

IMAGENET: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP: Stats = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def torchvision_fields(
    scaled: tuple[int, int], target: tuple[int, int], resample: int, stats: list[tuple[Any, ...]]
) -> Fields:
    """Resize so that it covers `scaled`, then cut `target` out, as timm and open_clip do."""
    square = scaled[0] == scaled[1]
    return {
        "size": None if square else scaled,
        "shortest_edge": scaled[0] if square else None,
        "fit": "squash" if square else "cover",
        "multiple_of": None,
        "resample": resample,
        "float_resize": False,
        "crop_size": target,
        "crop_rounding": "even",
        "fill": None,
        "rescale_factor": 1 / 255,
        "image_mean": stats[0],
        "image_std": stats[1],
        "in_channels": 3,
        "levels": None,
    }


def output_size(fields: Fields) -> tuple[int, int]:
    """The (height, width) that comes out, or the nearest to it where that hangs on the image."""
    pair = fields["crop_size"] or fields["size"] or (fields["shortest_edge"] or 224,) * 2
    return (pair[0], pair[1])


def mean_and_std(fields: Fields) -> tuple[list[float], list[float]]:
    """Of a rule, as lists; where it normalises nothing, those that change nothing."""
    if fields["image_mean"] is None:
        return [0.0] * fields["in_channels"], [1.0] * fields["in_channels"]
    return list(fields["image_mean"]), list(fields["image_std"])


def resample_code(name: object) -> int:
    """Pillow's code of a filter by its name. Raises ConfigError for no such name."""
    codes = [code for code, known in RESAMPLE.items() if known == name]
    if not codes:
        raise ConfigError(f"interpolation={name!r}: expected one of {', '.join(RESAMPLE.values())}")
    return codes[0]


def check_mapping(name: str, value: object) -> Mapping[str, Any]:
    """A JSON object. Raises ConfigError, by the name, for anything else."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is a {type(value).__name__}: expected an object")
    return value


def check_list(name: str, value: object) -> tuple[Any, ...]:
    """A JSON list. Raises ConfigError, by the name, for anything else."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name}={value!r}: expected a list")
    return tuple(value)


def per_channel(value: object) -> tuple[Any, ...]:
    """A list as it is, a plain number for each of three channels."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * 3
