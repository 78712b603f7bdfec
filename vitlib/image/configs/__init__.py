"""How rule files say what ImageProcessor does, both ways, and what each library does unasked.

A rule is here a dict of ImageProcessor's fields. `find` reads the one of a checkpoint, whoever
wrote it; hf_, timm_ and openclip_ read and write one form each; `lost` says what a form cannot
hold, and `profile_fields` what a library does with a family where no file says it.
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
)
from vitlib.image.configs.hf import hf_config, hf_fields
from vitlib.image.configs.profiles import PROFILES, UNIFORM_FAMILIES, profile_fields
from vitlib.image.configs.timm import (
    openclip_config,
    openclip_fields,
    timm_config,
    timm_config_fields,
    timm_fields,
)

__all__ = [
    "CROP_ROUNDINGS",
    "FITS",
    "PROFILES",
    "RESAMPLE",
    "TORCH_MODES",
    "UNIFORM_FAMILIES",
    "Fields",
    "check_fields",
    "find_fields",
    "hf_config",
    "hf_fields",
    "openclip_config",
    "openclip_fields",
    "profile_fields",
    "timm_config",
    "timm_fields",
    "unsupported_fields",
]


def find_fields(read: Callable[[str], dict[str, Any] | None]) -> Fields | None:
    """The rule of a checkpoint, or None where no file holds one; `read` gives a JSON file by name.

    In this order: preprocessor_config.json, processor_config.json, timm's config.json,
    open_clip_config.json. Raises ConfigError, naming the file, for a rule that cannot be followed.
    """
    name = "preprocessor_config.json"
    try:
        rule = read(name)
        if rule is None:
            name = "processor_config.json"
            rule = (read(name) or {}).get("image_processor")
        config = read("config.json") or {}
        if rule is not None:
            return hf_fields(check_mapping("image_processor", rule), config.get("model_type"))
        name = "config.json"
        # timm keeps the rule in pretrained_cfg; before that it lay beside the architecture.
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
    """What of a rule a library's file cannot hold, a line each: "hf", "timm" or "openclip"."""
    readers: dict[str, Callable[[], Fields]] = {
        "hf": lambda: hf_fields(_known_to_hf(hf_config(fields))),
        "timm": lambda: timm_fields(timm_config(fields)),
        "openclip": lambda: openclip_fields({"preprocess_cfg": openclip_config(fields)}),
    }
    if layout not in readers:
        raise ConfigError(f"layout={layout!r}: expected one of {', '.join(readers)}")
    mine, theirs = _canonical(fields), _canonical(readers[layout]())
    return [
        f"preprocessing: {name} is {mine[name]}, in {layout} it becomes {theirs[name]}"
        for name in mine
        if mine[name] != theirs[name]
    ]


def _known_to_hf(rule: dict[str, Any]) -> dict[str, Any]:
    own = ("crop_rounding", "fit", "fill", "levels", "multiple_of")
    return {k: v for k, v in rule.items() if k not in own}


def _canonical(fields: Fields) -> Fields:
    """The fields, with those that change no pixel at one value."""
    same = dict(fields)
    unit = not any(same["image_mean"] or ()) and all(v == 1 for v in same["image_std"] or ())
    if unit:
        same |= {"image_mean": None, "image_std": None}
    if same["fit"] == "squash" and same["size"] == same["crop_size"]:
        same["crop_size"] = None
    if same["size"] is None and same["shortest_edge"] is None:
        same |= {"resample": None, "float_resize": False}
    crop = same["crop_size"]
    fixed = same["size"] if same["fit"] == "squash" else None
    odd = crop and not (fixed and all((a - b) % 2 == 0 for a, b in zip(fixed, crop, strict=True)))
    if not odd:
        same["crop_rounding"] = None
    if not any(same["fill"] or ()):
        same["fill"] = None
    return same
