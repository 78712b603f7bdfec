"""Reading and writing of timm's `pretrained_cfg` and open_clip's `preprocess_cfg`.

Both evaluate with torchvision's transforms on Pillow images, whose crop rounds half to even.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitlib.errors import ConfigError, is_number, to_pair
from vitlib.image.configs.fields import (
    CLIP_STATS,
    IMAGENET_STATS,
    RESAMPLE,
    Fields,
    check_list,
    check_mapping,
    mean_and_std,
    output_size,
    per_channel,
    resample_code,
    torchvision_fields,
)


def timm_fields(rule: Mapping[str, Any]) -> Fields:
    """Read timm's `pretrained_cfg` as timm's evaluation transform does.

    Args:
        rule: The content of `pretrained_cfg`; timm's defaults stand for missing keys.

    Returns:
        All fields.

    Raises:
        ConfigError: It has steps that vitlib does not do, or impossible values.
    """

    def get(key: str, default: Any) -> Any:
        return rule.get(key) or default

    shape = _input_size(rule)
    channels, target = to_pair("input_size", shape[0])[0], to_pair("input_size", shape[1:])
    mode, crop_pct = get("crop_mode", "center"), get("crop_pct", 0.875)
    if mode not in ("center", "squash", "border"):
        raise ConfigError(f"crop_mode={mode!r}: expected center, squash or border")
    if not is_number(crop_pct) or not 0.01 <= crop_pct <= 100:
        raise ConfigError(f"crop_pct={crop_pct!r}: expected a number in 0.01..100")
    scaled = _resize_target(target, crop_pct)
    stats = [check_list(key, get(key, IMAGENET_STATS[i])) for i, key in enumerate(("mean", "std"))]
    fields = torchvision_fields(
        scaled, target, resample_code(get("interpolation", "bicubic")), stats
    )
    fields["in_channels"] = channels
    if mode != "center":
        fields |= {"size": scaled, "shortest_edge": None, "fit": "squash"}
    if mode == "squash" and scaled == target:
        fields["crop_size"] = None
    if mode == "border":
        fill = tuple(round(255 * value) if is_number(value) else 0 for value in stats[0])
        fields |= {"fit": "contain", "fill": fill}
    return fields


def timm_config_fields(config: Mapping[str, Any]) -> Fields:
    """Read timm's config.json, whose model_args may replace the input size of `pretrained_cfg`.

    Args:
        config: The content of the file.

    Returns:
        All fields.

    Raises:
        ConfigError: It has steps that vitlib does not do, or impossible values.
    """
    rule = check_mapping("pretrained_cfg", config["pretrained_cfg"])
    return timm_fields({**rule, "input_size": timm_input_size(config)})


def timm_input_size(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return (channels, height, width) of the pixels that timm prepares for a config.json.

    As in timm, in_chans of model_args replaces the channels of input_size. img_size replaces its
    sides for a model of a single size.

    Args:
        config: The content of config.json.

    Returns:
        Three numbers.

    Raises:
        ConfigError: input_size is not three numbers.
    """
    rule = check_mapping("pretrained_cfg", config.get("pretrained_cfg") or {})
    args = check_mapping("model_args", config.get("model_args") or {})
    channels, *size = _input_size(rule)
    if args.get("in_chans") is not None:
        channels = args["in_chans"]
    is_dynamic = args.get("dynamic_img_size") or args.get("strict_img_size") is False
    if args.get("img_size") is not None and rule.get("fixed_input_size") and not is_dynamic:
        size = list(to_pair("img_size", args["img_size"]))
    return (channels, *size)


def _input_size(rule: Mapping[str, Any]) -> tuple[Any, ...]:
    shape = check_list("input_size", rule.get("input_size") or (3, 224, 224))
    if len(shape) != 3:
        raise ConfigError(f"input_size={shape}: expected (channels, height, width)")
    return shape


def timm_config(fields: Fields) -> dict[str, Any]:
    """Write the preprocessing as keys of timm's `pretrained_cfg`.

    Args:
        fields: All fields; see unsupported_fields() for those that are not stored.

    Returns:
        The keys and values.
    """
    target = output_size(fields)
    scaled = fields["size"] or (fields["shortest_edge"] or min(target),) * 2
    mode = {"squash": "squash", "cover": "center", "contain": "border"}[fields["fit"]]
    mode = "center" if fields["size"] is None else mode
    mean, std = mean_and_std(fields)
    return {
        "input_size": [fields["in_channels"], *target],
        "interpolation": RESAMPLE[fields["resample"]],
        "crop_pct": _share(target, (scaled[0], scaled[1])),
        "crop_mode": mode,
        "mean": mean,
        "std": std,
    }


def openclip_fields(config: Mapping[str, Any]) -> Fields:
    """Read the `preprocess_cfg` of an open_clip_config.json, with the model's image size.

    Args:
        config: The content of the file.

    Returns:
        All fields.

    Raises:
        ConfigError: It has steps that vitlib does not do, or impossible values.
    """
    rule = check_mapping("preprocess_cfg", config.get("preprocess_cfg") or {})
    model = check_mapping("model_cfg", config.get("model_cfg") or {})
    vision = check_mapping("vision_cfg", model.get("vision_cfg") or {})
    # open_clip prefers the image size of the vision tower to that of preprocess_cfg.
    target = to_pair("size", vision.get("image_size") or rule.get("size") or 224)
    mode, name = rule.get("resize_mode") or "shortest", rule.get("interpolation") or "bicubic"
    if mode not in ("shortest", "longest", "squash"):
        raise ConfigError(f"resize_mode={mode!r}: expected shortest, longest or squash")
    if rule.get("mode") not in (None, "RGB"):
        raise ConfigError(f"mode={rule['mode']!r}: expected RGB")
    stats = [per_channel(rule.get(key) or CLIP_STATS[i]) for i, key in enumerate(("mean", "std"))]
    resample = 3 if name == "random" else resample_code(name)
    fields = torchvision_fields(target, target, resample, stats)
    if mode == "squash":
        fields |= {"size": target, "shortest_edge": None, "fit": "squash", "crop_size": None}
    elif mode == "longest":
        fill = (rule.get("fill_color") or 0,) * 3
        fields |= {"size": target, "shortest_edge": None, "fit": "contain", "fill": fill}
    return fields


def openclip_config(fields: Fields) -> dict[str, Any]:
    """Write the preprocessing as open_clip's `preprocess_cfg`.

    Args:
        fields: All fields; see unsupported_fields() for those that are not stored.

    Returns:
        The keys and values.
    """
    target = output_size(fields)
    mode = {"squash": "squash", "cover": "shortest", "contain": "longest"}[fields["fit"]]
    mean, std = mean_and_std(fields)
    return {
        "size": target[0] if target[0] == target[1] else list(target),
        "mode": "RGB",
        "mean": mean,
        "std": std,
        "interpolation": "bilinear" if fields["resample"] == 2 else "bicubic",
        "resize_mode": "shortest" if fields["size"] is None else mode,
        "fill_color": fields["fill"][0] if fields["fill"] else 0,
    }


def _resize_target(target: tuple[int, int], share: float) -> tuple[int, int]:
    """Return the size to which timm resizes before it crops `target`."""
    return math.floor(target[0] / share), math.floor(target[1] / share)


def _share(target: tuple[int, int], scaled: tuple[int, int]) -> float:
    """Return the crop_pct that leads from target to scaled, with as few digits as possible.

    For 224 and 248 that is 0.9, which a person wrote, and not 0.9032.
    """
    most = min(target[0] / scaled[0], target[1] / scaled[1])
    for digits in range(1, 16):
        share: float = math.floor(most * 10**digits) / 10**digits
        if share > 0 and _resize_target(target, share) == scaled:
            return share
    return most
