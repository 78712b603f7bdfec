"""Preprocessing of satellite bands: values as they are in the file, normalised band by band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitlib.errors import ConfigError
from vitlib.image.configs.fields import Fields, check_list, check_mapping


def band_fields(mean: Sequence[float], std: Sequence[float]) -> Fields:
    """Return the fields that normalise bands, without a resize, a crop or a rescale.

    Args:
        mean: A number a band, in the unit of the file.
        std: A number a band.

    Returns:
        All fields.
    """
    return {
        "size": None,
        "shortest_edge": None,
        "fit": "squash",
        "multiple_of": None,
        "max_patches": None,
        "resample": 2,
        "float_resize": False,
        "crop_size": None,
        "crop_rounding": "even",
        "fill": None,
        "rescale_factor": None,
        "image_mean": tuple(mean),
        "image_std": tuple(std),
        "in_channels": len(mean),
        "levels": None,
    }


def prithvi_fields(config: Mapping[str, Any]) -> Fields:
    """Read the config.json of a Prithvi model.

    Args:
        config: The content of the file.

    Returns:
        All fields.

    Raises:
        ConfigError: The config does not have a mean and a std for each band.
    """
    rule = check_mapping("pretrained_cfg", config.get("pretrained_cfg") or {})
    mean, std = (check_list(key, rule.get(key) or ()) for key in ("mean", "std"))
    if not mean or len(mean) != len(std):
        raise ConfigError(
            f"mean of {len(mean)} and std of {len(std)} numbers: expected a number a band"
        )
    return band_fields(mean, std)
