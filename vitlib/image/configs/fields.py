"""What the readers of rules share: the tables of names, and values checked as they are read.

A rule is a dict of ImageProcessor's fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from vitlib.config import is_number, to_pair
from vitlib.errors import ConfigError
from vitlib.image.decode import MAX_PIXELS
from vitlib.image.depth import check_levels, is_8_bit_factor

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


def check_fields(fields: Fields) -> Fields:
    """Check ImageProcessor's fields.

    Returns:
        Those that have another form than they came in: sides as pairs, a window as a tuple.

    Raises:
        ConfigError: a value that no image can be processed with, or two that contradict.
    """
    changed: Fields = {"levels": check_levels(fields["levels"])}
    for name in ("size", "crop_size", "multiple_of"):
        if fields[name] is not None:
            height, width = to_pair(name, fields[name])
            changed[name] = (height, width)
            if height * width > MAX_PIXELS:
                raise ConfigError(
                    f"{name}={height}x{width}: expected at most {MAX_PIXELS} pixels in all"
                )
    if fields["shortest_edge"] is not None:
        to_pair("shortest_edge", fields["shortest_edge"])
        if fields["size"] is not None:
            raise ConfigError("size and shortest_edge are two ways to resize: give one")
    if fields["multiple_of"] is not None and (
        fields["shortest_edge"] is None or fields["crop_size"]
    ):
        raise ConfigError("multiple_of rounds what shortest_edge gives, with no crop_size")
    if type(fields["resample"]) is not int or fields["resample"] not in RESAMPLE:
        raise ConfigError(f"resample={fields['resample']!r}: expected one of {RESAMPLE}")
    _check_scale(fields)
    _check_names(fields)
    return changed


def _check_scale(fields: Fields) -> None:
    mean, std, factor = (fields[name] for name in ("image_mean", "image_std", "rescale_factor"))
    if (mean is None) != (std is None):
        raise ConfigError("image_mean and image_std go together")
    for name, values in (("image_mean", mean), ("image_std", std)):
        if values is not None and not (
            len(values) == fields["in_channels"] and all(map(is_number, values))
        ):
            raise ConfigError(f"{name}={values}: expected {fields['in_channels']} numbers")
    if std is not None and not all(std):
        raise ConfigError(f"image_std={std}: expected no zero")
    if factor is not None and not is_number(factor):
        raise ConfigError(f"rescale_factor={factor!r}: expected a number")
    if fields["levels"] is not None and not is_8_bit_factor(factor):
        raise ConfigError(
            f"levels={fields['levels']} (--levels) makes 0..255 of a picture for "
            f"rescale_factor=1/255, and rescale_factor={factor} is for the numbers as they are in "
            "the file: give one of both"
        )


def _check_names(fields: Fields) -> None:
    for name, known in (("fit", FITS), ("crop_rounding", CROP_ROUNDINGS)):
        if fields[name] not in known:
            raise ConfigError(f"{name}={fields[name]!r}: expected one of {known}")
    if fields["fit"] != "squash" and (fields["size"] is None or fields["crop_size"] is None):
        raise ConfigError(f"fit={fields['fit']!r} leaves the shape: give size and crop_size")
    fill, channels = fields["fill"], fields["in_channels"]
    if fill is not None and not (
        len(fill) == channels and all(type(level) is int and 0 <= level <= 255 for level in fill)
    ):
        raise ConfigError(f"fill={fill}: expected {channels} levels in 0..255")
    resample, factor = fields["resample"], fields["rescale_factor"]
    if fields["float_resize"] and (resample not in TORCH_MODES or factor is None or fill):
        raise ConfigError(
            f"float_resize with resample={resample}, rescale_factor={factor} and fill={fill}: "
            "expected resample 2 or 3, a factor and no fill"
        )
