"""Which values a rule may have, whoever wrote it."""

from __future__ import annotations

from vitlib.config import is_number, to_pair
from vitlib.errors import ConfigError
from vitlib.image.configs.fields import CROP_ROUNDINGS, FITS, RESAMPLE, TORCH_MODES, Fields
from vitlib.image.decode import MAX_PIXELS
from vitlib.image.depth import check_levels, is_8_bit_factor


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
