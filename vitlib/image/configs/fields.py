"""Fields of ImageProcessor as a dict: names of values, checks, conversions, a description.

The readers and writers of each library's config files (hf.py, timm.py, transform.py) share them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from vitlib.errors import ConfigError, check_int, is_number, to_pair
from vitlib.image.depth import check_levels, is_8_bit_factor
from vitlib.image.open_files import MAX_PIXELS

Fields: TypeAlias = dict[str, Any]
Stats: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, a channel each

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
TORCH_MODES = {2: "bilinear", 3: "bicubic"}  # the same filters as torch names them
FITS = ("squash", "cover", "contain")
CROP_ROUNDINGS = ("floor", "even", "zero")

IMAGENET_STATS: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_STATS: Stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP_STATS: Stats = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def torchvision_fields(
    scaled: tuple[int, int], target: tuple[int, int], resample: int, stats: list[tuple[Any, ...]]
) -> Fields:
    """Return the fields of torchvision's Resize and CenterCrop, which timm and open_clip use.

    Args:
        scaled: (height, width) that the resized image covers.
        target: (height, width) of the crop.
        resample: Pillow's code of the filter.
        stats: Mean and std, a number a channel.

    Returns:
        All fields.
    """
    square = scaled[0] == scaled[1]
    return {
        "size": None if square else scaled,
        "shortest_edge": scaled[0] if square else None,
        "fit": "squash" if square else "cover",
        "multiple_of": None,
        "max_patches": None,
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
    """Return the (height, width) of the pixels.

    Args:
        fields: All fields.

    Returns:
        The size; a square of the shorter side where the size depends on the image.
    """
    if fields["max_patches"] is not None:
        side = math.isqrt(fields["max_patches"])
        return side * fields["multiple_of"][0], side * fields["multiple_of"][1]
    pair = fields["crop_size"] or fields["size"] or (fields["shortest_edge"] or 224,) * 2
    return (pair[0], pair[1])


def mean_and_std(fields: Fields) -> tuple[list[float], list[float]]:
    """Return mean and std as lists.

    Args:
        fields: All fields.

    Returns:
        A number a channel each; zeros and ones if there is no normalisation.
    """
    if fields["image_mean"] is None:
        return [0.0] * fields["in_channels"], [1.0] * fields["in_channels"]
    return list(fields["image_mean"]), list(fields["image_std"])


def resample_code(name: object) -> int:
    """Return Pillow's code of a filter.

    Args:
        name: Its name, as in RESAMPLE.

    Returns:
        The code, 0..5.

    Raises:
        ConfigError: There is no such filter.
    """
    codes = [code for code, label in RESAMPLE.items() if label == name]
    if not codes:
        raise ConfigError(f"interpolation={name!r}: expected one of {', '.join(RESAMPLE.values())}")
    return codes[0]


def check_mapping(name: str, value: object) -> Mapping[str, Any]:
    """Check that a JSON value is an object.

    Args:
        name: Key of the value, for the error.
        value: The value.

    Returns:
        The same value.

    Raises:
        ConfigError: It is not an object.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is a {type(value).__name__}: expected an object")
    return value


def check_list(name: str, value: object) -> tuple[Any, ...]:
    """Check that a JSON value is a list.

    Args:
        name: Key of the value, for the error.
        value: The value.

    Returns:
        The list as a tuple.

    Raises:
        ConfigError: It is not a list.
    """
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name}={value!r}: expected a list")
    return tuple(value)


def per_channel(value: object) -> tuple[Any, ...]:
    """Repeat a number for each of three channels.

    Args:
        value: A number, or a list of a number a channel.

    Returns:
        A number a channel.
    """
    return tuple(value) if isinstance(value, list | tuple) else (value,) * 3


def check_fields(fields: Fields) -> Fields:
    """Check ImageProcessor's fields.

    Args:
        fields: All fields.

    Returns:
        Fields in another form than they were passed: sides as pairs, a window as a tuple.

    Raises:
        ConfigError: A value is out of range, or two values contradict each other.
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
    _check_whole_patches(fields)
    if type(fields["resample"]) is not int or fields["resample"] not in RESAMPLE:
        raise ConfigError(f"resample={fields['resample']!r}: expected one of {RESAMPLE}")
    _check_scale(fields)
    _check_names(fields)
    return changed


def _check_whole_patches(fields: Fields) -> None:
    patch, count = fields["multiple_of"], fields["max_patches"]
    if count is not None:
        check_int("max_patches", count, at_least=1)
        if patch is None or fields["size"] or fields["shortest_edge"] or fields["crop_size"]:
            raise ConfigError(
                "max_patches counts patches of multiple_of: give both, and no size, no "
                "shortest_edge and no crop_size"
            )
        height, width = to_pair("multiple_of", patch)
        if count * height * width > MAX_PIXELS:
            raise ConfigError(
                f"max_patches={count} of {height}x{width}: expected at most {MAX_PIXELS} pixels in "
                "all"
            )
    elif patch is not None and (fields["shortest_edge"] is None or fields["crop_size"]):
        raise ConfigError("multiple_of rounds what shortest_edge gives, with no crop_size")


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
    for name, choices in (("fit", FITS), ("crop_rounding", CROP_ROUNDINGS)):
        if fields[name] not in choices:
            raise ConfigError(f"{name}={fields[name]!r}: expected one of {choices}")
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


def resize_fields(
    fields: Fields,
    image_size: tuple[int, int] | Literal["keep"],
    patch_size: tuple[int, int] | None,
) -> Fields:
    """Return the changed fields of ImageProcessor.with_image_size().

    Args:
        fields: All fields.
        image_size: (height, width) of the new pixels, or "keep" for the image's aspect ratio.
        patch_size: (height, width) of a patch; needed for "keep".

    Returns:
        The fields to replace.

    Raises:
        ConfigError: "keep" without patch_size.
    """
    crop_size, size, shortest_edge = (fields[k] for k in ("crop_size", "size", "shortest_edge"))
    if image_size == "keep":
        if patch_size is None:
            raise ConfigError("image_size='keep' rounds to whole patches: give patch_size")
        if fields["max_patches"] is not None:
            return {"multiple_of": patch_size}
        sides = crop_size or size or (shortest_edge or max(patch_size),)
        return {
            "size": None, "fit": "squash", "crop_size": None, "fill": None,
            "shortest_edge": min(sides), "multiple_of": patch_size,
        }  # fmt: skip
    if fields["max_patches"] is not None:
        return {"size": image_size, "multiple_of": None, "max_patches": None}
    if fields["multiple_of"] is not None:
        return {"shortest_edge": min(image_size)}
    if shortest_edge is None and crop_size is None:
        return {"size": image_size}
    crop = crop_size or (shortest_edge or 1,) * 2
    growth = max(image_size[0] / crop[0], image_size[1] / crop[1])
    changes: Fields = {"crop_size": image_size}
    if shortest_edge is not None:
        changes["shortest_edge"] = max(round(shortest_edge * growth), *image_size)
    if size is not None:
        changes["size"] = tuple(round(side * growth) for side in size)
    return changes


def squash_fields(fields: Fields) -> Fields:
    """Return the changed fields of ImageProcessor.with_squash().

    Args:
        fields: All fields.

    Returns:
        The fields to replace.
    """
    sides = fields["crop_size"] or fields["size"]
    if fields["max_patches"] is not None:
        sides = output_size(fields)
    return {
        "size": sides or to_pair("shortest_edge", fields["shortest_edge"]),
        "fit": "squash", "shortest_edge": None, "multiple_of": None, "fill": None,
        "crop_size": None, "max_patches": None,
    }  # fmt: skip


def convert_channels(
    fields: Fields, in_channels: int, band_map: Sequence[int | None] | None
) -> Fields:
    """Return the changed fields of ImageProcessor.with_channels().

    Args:
        fields: All fields.
        in_channels: New number of channels.
        band_map: Old channel of each new one, None for their average; None repeats the old ones.

    Returns:
        The fields to replace.
    """
    old = fields["in_channels"]

    def convert(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if values is None:
            return None
        mean = sum(values) / old if len(set(values)) > 1 else values[0]
        if band_map is not None:
            return tuple(mean if band is None else values[band] for band in band_map)
        return tuple(mean if in_channels == 1 else values[i % old] for i in range(in_channels))

    fill = convert(fields["fill"])
    return {
        "in_channels": in_channels,
        "fill": None if fill is None else tuple(round(value) for value in fill),
        "image_mean": convert(fields["image_mean"]),
        "image_std": convert(fields["image_std"]),
    }


def describe_fields(fields: Fields) -> str:
    """Describe the steps of a preprocessing in one line.

    Args:
        fields: All fields.

    Returns:
        The steps, joined by semicolons; "none" if there are none.
    """
    steps = []
    size, crop, multiple_of = (fields[k] for k in ("size", "crop_size", "multiple_of"))
    if size is not None:
        how = {"squash": "", "cover": "cover ", "contain": "fit into "}[fields["fit"]]
        steps.append(f"resize to {how}{size[0]}x{size[1]}")
    if fields["shortest_edge"] is not None:
        steps.append(f"resize the shorter edge to {fields['shortest_edge']}")
    if fields["max_patches"] is not None:
        count, (height, width) = fields["max_patches"], multiple_of
        steps.append(f"resize to at most {count} patches of {height}x{width}, aspect ratio kept")
    elif multiple_of is not None:
        steps[0] += f", sides to multiples of {multiple_of[0]}x{multiple_of[1]}"
    if steps:
        steps[0] += f" ({RESAMPLE[fields['resample']]}{', of floats' * fields['float_resize']})"
    if crop is not None:
        steps.append(f"crop {crop[0]}x{crop[1]}")
    if fields["rescale_factor"] is not None:
        steps.append(f"times {fields['rescale_factor']:.6g}")
    if fields["image_mean"] is not None and fields["image_std"] is not None:
        stats = fields["image_mean"], fields["image_std"]
        mean, std = (" ".join(f"{v:g}" for v in x) for x in stats)
        steps.append(f"minus {mean}, over {std}")
    levels = fields["levels"]
    if levels is not None:
        black, white = (0, levels) if is_number(levels) else levels
        steps.insert(0, f"deeper than 8 bits: {black:g} is black, {white:g} white")
    return "; ".join(steps) or "none"
