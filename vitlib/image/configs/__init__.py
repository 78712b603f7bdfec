"""Preprocessing configs of each library, read into and written from ImageProcessor's fields.

`find_fields` reads the config of a checkpoint of any library. hf_, timm_ and openclip_ functions
read and write one form each. `unsupported_fields` lists the fields that a form cannot store.
`transform_fields` gives those of a library's evaluation, for checkpoints that state none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitlib.errors import ConfigError
from vitlib.image.configs.fields import (
    CROP_ROUNDINGS,
    FITS,
    RESAMPLE,
    TORCH_MODES,
    Fields,
    check_fields,
    check_mapping,
    convert_channels,
    describe_fields,
    resize_fields,
    squash_fields,
)
from vitlib.image.configs.hf import add_model_stats, hf_config, hf_fields
from vitlib.image.configs.timm import (
    openclip_config,
    openclip_fields,
    timm_config,
    timm_config_fields,
    timm_fields,
)
from vitlib.image.configs.transform import transform_fields

__all__ = [
    "CROP_ROUNDINGS",
    "FITS",
    "RESAMPLE",
    "TORCH_MODES",
    "Fields",
    "check_fields",
    "convert_channels",
    "describe_fields",
    "find_fields",
    "hf_config",
    "hf_fields",
    "openclip_config",
    "openclip_fields",
    "resize_fields",
    "squash_fields",
    "timm_config",
    "timm_fields",
    "transform_fields",
    "unsupported_fields",
]


def find_fields(read: Callable[[str], dict[str, Any] | None]) -> Fields | None:
    """Read the preprocessing of a checkpoint.

    The first of these files that has one is read: preprocessor_config.json, processor_config.json,
    timm's config.json, open_clip_config.json.

    Args:
        read: Returns a JSON file of the checkpoint by its name, None if there is no such file.

    Returns:
        All fields; None if no file states them.

    Raises:
        ConfigError: The config has steps that vitlib does not do, or impossible values. The message
            names the file.
    """
    name = "preprocessor_config.json"
    try:
        rule = read(name)
        if rule is None:
            name = "processor_config.json"
            rule = (read(name) or {}).get("image_processor")
        config = read("config.json") or {}
        if rule is not None:
            fields = hf_fields(check_mapping("image_processor", rule), config.get("model_type"))
            return add_model_stats(fields, config)
        name = "config.json"
        if str(config.get("architecture")).startswith("prithvi_eo"):
            from vitlib.image.configs.bands import prithvi_fields  # few programs need it

            return prithvi_fields(config)
        # timm writes it into pretrained_cfg; older versions wrote it beside the architecture.
        if config.get("pretrained_cfg"):
            return timm_config_fields(config)
        if "architecture" in config and ("input_size" in config or "mean" in config):
            return timm_fields(config)
        name = "open_clip_config.json"
        config = read(name) or {}
        return openclip_fields(config) if "preprocess_cfg" in config else None
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def unsupported_fields(fields: Fields, layout: str) -> list[str]:
    """List the fields that a library's file cannot store.

    Args:
        fields: All fields.
        layout: "hf", "timm" or "openclip".

    Returns:
        A line for each, with the value that the library's reader gets instead.

    Raises:
        ConfigError: Another layout.
    """
    readers: dict[str, Callable[[], Fields]] = {
        "hf": lambda: hf_fields(_without_own_keys(hf_config(fields))),
        "timm": lambda: timm_fields(timm_config(fields)),
        "openclip": lambda: openclip_fields({"preprocess_cfg": openclip_config(fields)}),
    }
    if layout not in readers:
        raise ConfigError(f"layout={layout!r}: expected one of {', '.join(readers)}")
    before, after = _canonical(fields), _canonical(readers[layout]())
    return [
        f"preprocessing: {name} is {before[name]}, in {layout} it becomes {after[name]}"
        for name in before
        if before[name] != after[name]
    ]


def _without_own_keys(rule: dict[str, Any]) -> dict[str, Any]:
    """Remove the keys that vitlib adds to a preprocessor_config.json and transformers ignores."""
    own = ("crop_rounding", "fit", "fill", "levels", "multiple_of")
    return {k: v for k, v in rule.items() if k not in own}


def _canonical(fields: Fields) -> Fields:
    """Return the fields with a fixed value for each that changes no pixel."""
    same = dict(fields)
    unit = not any(same["image_mean"] or ()) and all(v == 1 for v in same["image_std"] or ())
    if unit:
        same |= {"image_mean": None, "image_std": None}
    if same["fit"] == "squash" and same["size"] == same["crop_size"]:
        same["crop_size"] = None
    if not any(same[name] for name in ("size", "shortest_edge", "max_patches")):
        same |= {"resample": None, "float_resize": False}
    crop = same["crop_size"]
    fixed = same["size"] if same["fit"] == "squash" else None
    odd = crop and not (fixed and all((a - b) % 2 == 0 for a, b in zip(fixed, crop, strict=True)))
    if not odd:
        same["crop_rounding"] = None
    if not any(same["fill"] or ()):
        same["fill"] = None
    return same
