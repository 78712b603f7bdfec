"""Reading and writing of Hugging Face's preprocessor_config.json, of all versions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vitlib.errors import ConfigError, check_int, is_number, to_pair
from vitlib.image.configs.fields import (
    CLIP_STATS,
    HALF_STATS,
    IMAGENET_STATS,
    Fields,
    check_list,
    per_channel,
)

# Defaults of transformers' classes for keys that preprocessor_config.json lacks. "square": a single
# number is the side of a square (True) or the shorter edge (False).
_COMMON: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "mean": HALF_STATS[0],
    "std": HALF_STATS[1],
    "rounding": "floor",
}
_CROP = {"do_center_crop": True, "crop": 224}
_CLASSES: dict[str, dict[str, Any]] = {
    "ViT": _COMMON | {"size": 224, "square": True, "resample": 2},
    "DeiT": _COMMON | _CROP | {"size": 256, "square": True, "resample": 3},
    "Beit": _COMMON | {"size": 224, "square": True, "resample": 3, "crop": 224},
    "Siglip": _COMMON | {"size": (224, 224), "square": False, "resample": 3},
    "ConvNext": _COMMON | {"size": 384, "square": False, "resample": 3},
    "Bit": _COMMON
    | _CROP
    | {"size": 224, "square": False, "resample": 3, "mean": CLIP_STATS[0], "std": CLIP_STATS[1]},
    # Its one class resizes floats and crops as torchvision does on tensors: halves towards zero.
    "DINOv3ViT": _COMMON
    | {
        "size": 224,
        "square": True,
        "resample": 2,
        "mean": IMAGENET_STATS[0],
        "std": IMAGENET_STATS[1],
    }
    | {"float": True, "rounding": "zero"},
}
_CLASSES["CLIP"] = _CLASSES["ChineseCLIP"] = _CLASSES["Llava"] = _CLASSES["Bit"]
_OF_CLIP = {"mean": CLIP_STATS[0], "std": CLIP_STATS[1], "square": True, "resample": 3}
_CLASSES |= {
    "Blip": _COMMON | _OF_CLIP | {"size": 384},
    "OwlViT": _COMMON | _OF_CLIP | {"size": 768, "crop": 768},
    "Flava": _COMMON | _OF_CLIP | _CROP | {"size": 224},
    "DPT": _COMMON | {"size": 384, "square": True, "resample": 3},
    # Each image has its own number of patches (NaFlex), which the class pads to the most.
    "Siglip2": _COMMON | {"resample": 2, "patch_size": 16, "max_num_patches": 256},
    "Gemma3": _COMMON | {"size": 224, "square": True, "resample": 2},
}
_TILES = "cuts each photo into tiles"
_REFUSED = {
    "LlavaNext": _TILES,
    "LlavaNextVideo": _TILES,
    "LlavaOnevision": _TILES,
    "Idefics2": _TILES,
    "Idefics3": _TILES,
    "SmolVLM": _TILES,
    "GotOcr2": _TILES,
    "Molmo2": _TILES,
    "Ovis2": _TILES,
    "Janus": "pads each photo to a square after its own resize",
    "Owlv2": "pads each photo to a square before its resize",
    "ZoeDepth": "pads by reflection",
}
# Steps that vitlib does not do, and the value that switches each off.
_STEPS = {
    "do_pad": False,
    "do_pan_and_scan": False,
    "do_image_splitting": False,
    "crop_to_patches": False,
    "keep_aspect_ratio": False,
    "ensure_multiple_of": 1,
}
# Keys that need a value if their step is done.
_KEYS = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}
# The class that AutoImageProcessor takes for a model_type where the file names none, and the one
# for the vision tower's own model_type. siglip2 alone is NaFlex; fixed sizes say siglip.
_CLASS_OF_MODEL = {
    **dict.fromkeys(("vit", "vit_mae", "vit_msn", "ijepa"), "ViT"),
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "pixio"), "Bit"),
    **dict.fromkeys(("beit", "data2vec-vision"), "Beit"),
    **dict.fromkeys(
        (
            "clip",
            "clip_vision_model",
            "metaclip_2",
            "altclip",
            "kosmos-2",
            "git",
            "vipllava",
            "mlcd",
            "aimv2",
            "aimv2_vision_model",
        ),
        "CLIP",
    ),
    **dict.fromkeys(("blip", "blip-2", "instructblip"), "Blip"),
    **dict.fromkeys(("dpt", "depth_anything"), "DPT"),
    "chinese_clip": "ChineseCLIP",
    "clipseg": "ViT",
    "llava": "Llava",
    "paligemma": "Siglip",
    "gemma3": "Gemma3",
    "owlvit": "OwlViT",
    "flava": "Flava",
    **dict.fromkeys(("siglip", "siglip_vision_model"), "Siglip"),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), "Siglip2"),
    "deit": "DeiT",
    "dinov3_vit": "DINOv3ViT",
}


def hf_fields(rule: Mapping[str, Any], model_type: object = None) -> Fields:
    """Read a preprocessor_config.json of any version.

    Args:
        rule: The content of the file.
        model_type: The model's, which decides where the file names no class.

    Returns:
        All fields.

    Raises:
        ConfigError: It has steps that vitlib does not do, or impossible values.
    """
    name, default = _find_class(rule, model_type)

    def is_on(step: str) -> bool:
        return bool(rule.get(step, default.get(step, False)))  # transformers takes null as false

    def get(key: str, other: str | None = None) -> Any:
        value = rule.get(key, default.get(other or key))
        if value is None:
            raise ConfigError(_null_error(key, name, has_default=(other or key) in default))
        return value

    size, shortest_edge, crop_size, patches = None, None, None, {}
    resample = default["resample"] if rule.get("resample") is None else rule["resample"]
    if is_on("do_resize"):
        resample = get("resample")
    if name == "Siglip2":
        patches = _read_patches(rule, default) if is_on("do_resize") else {}
    elif is_on("do_resize"):
        size, shortest_edge = _read_size(get("size"), square=default["square"])
    if is_on("do_center_crop"):
        crop_size = _read_pair("crop_size", get("crop_size", "crop"))
    if name == "ConvNext" and shortest_edge is not None:
        if crop_size is not None:
            raise ConfigError("do_center_crop is true beside ConvNext's own crop")
        size, shortest_edge, crop_size = _convnext(shortest_edge, rule.get("crop_pct"))
    for key, off in _STEPS.items():
        if (rule.get(key) or off) != off:
            raise ConfigError(f"{key} is {str(rule[key]).lower()}, which vitlib does not do")
    mean, std = None, None
    if is_on("do_normalize"):
        mean, std = (per_channel(get(f"image_{key}", key)) for key in ("mean", "std"))
    return {
        "size": size,
        "shortest_edge": shortest_edge,
        "fit": rule.get("fit", "squash"),
        "multiple_of": _read_list("multiple_of", rule),
        "max_patches": None,
        "resample": resample,
        "float_resize": default.get("float", False),
        "crop_size": crop_size,
        "crop_rounding": rule.get("crop_rounding") or default["rounding"],
        "fill": _read_list("fill", rule),
        "rescale_factor": get("rescale_factor") if is_on("do_rescale") else None,
        "image_mean": mean,
        "image_std": std,
        "in_channels": 3 if mean is None else len(mean),
        "levels": rule.get("levels"),
        **patches,
    }


def _read_list(key: str, rule: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the list under a key of vitlib's own, if it is there."""
    return None if rule.get(key) is None else check_list(key, rule[key])


def _read_patches(rule: Mapping[str, Any], default: Mapping[str, Any]) -> Fields:
    """Return the fields of an image with its own number of patches."""
    count, side = (
        default[key] if rule.get(key) is None else rule[key]
        for key in ("max_num_patches", "patch_size")
    )
    patch = rule.get("multiple_of") or to_pair("patch_size", side)
    return {
        "max_patches": check_int("max_num_patches", count, at_least=1),
        "multiple_of": check_list("multiple_of", patch),
    }


def add_model_stats(fields: Fields, config: Mapping[str, Any]) -> Fields:
    """Add the normalisation that a model does itself to that of its preprocessing.

    Args:
        fields: All fields, of preprocessor_config.json.
        config: The content of config.json. RADIO's model alone normalises.

    Returns:
        The fields whose pixels are those that vitlib's model takes.

    Raises:
        ConfigError: The mean or the std of the model is impossible.
    """
    if config.get("model_type") != "radio":
        return fields
    mean, std = (
        per_channel(config.get(key, default))
        for key, default in zip(("norm_mean", "norm_std"), CLIP_STATS, strict=True)
    )
    if not all(map(is_number, (*mean, *std))) or len(mean) != len(std):
        raise ConfigError(f"norm_mean={mean!r}, norm_std={std!r}: expected a number a channel each")
    first_mean, first_std = fields["image_mean"], fields["image_std"]
    if first_mean is not None and (any(mean) or any(value != 1 for value in std)):
        mean = tuple(a + b * c for a, b, c in zip(first_mean, first_std, mean, strict=True))
        std = tuple(a * b for a, b in zip(first_std, std, strict=True))
    elif first_mean is not None:
        mean, std = first_mean, first_std
    return {**fields, "image_mean": mean, "image_std": std, "in_channels": len(mean)}


def hf_config(fields: Fields) -> dict[str, Any]:
    """Write a preprocessor_config.json that transformers 4 and 5 read.

    Fields for which transformers has no key are under vitlib's own keys, which it ignores.

    Args:
        fields: All fields; see unsupported_fields() for those that transformers ignores.

    Returns:
        The content of the file.
    """
    kind = "ViT" if fields["crop_size"] is None else "DeiT" if fields["size"] is not None else "Bit"
    kind = "DINOv3ViT" if fields["float_resize"] else kind
    kind = "Siglip2" if fields["max_patches"] is not None else kind
    rule: dict[str, Any] = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": any(fields[key] for key in ("size", "shortest_edge", "max_patches")),
        "resample": fields["resample"],
        "do_center_crop": fields["crop_size"] is not None,
        "do_rescale": fields["rescale_factor"] is not None,
        "do_normalize": fields["image_mean"] is not None,
    }
    if fields["shortest_edge"] is not None:
        rule["size"] = {"shortest_edge": fields["shortest_edge"]}
    elif fields["size"] is not None:
        rule["size"] = {"height": fields["size"][0], "width": fields["size"][1]}
    if fields["crop_size"] is not None:
        rule["crop_size"] = {"height": fields["crop_size"][0], "width": fields["crop_size"][1]}
    if fields["rescale_factor"] is not None:
        rule["rescale_factor"] = fields["rescale_factor"]
    if fields["image_mean"] is not None:
        rule |= {"image_mean": list(fields["image_mean"]), "image_std": list(fields["image_std"])}
    if fields["crop_rounding"] != _CLASSES[kind]["rounding"]:
        rule["crop_rounding"] = fields["crop_rounding"]
    if fields["fit"] != "squash":
        rule["fit"] = fields["fit"]
    if fields["max_patches"] is not None:
        rule |= {"patch_size": fields["multiple_of"][0], "max_num_patches": fields["max_patches"]}
    is_square = fields["multiple_of"] is not None and len({*fields["multiple_of"]}) == 1
    if fields["multiple_of"] is not None and not (kind == "Siglip2" and is_square):
        rule["multiple_of"] = list(fields["multiple_of"])
    if fields["levels"] is not None:
        levels = fields["levels"]
        rule["levels"] = list(levels) if isinstance(levels, tuple) else levels
    if fields["fill"] is not None:
        rule["fill"] = list(fields["fill"])
    return rule


def _find_class(rule: Mapping[str, Any], model_type: object) -> tuple[str, dict[str, Any]]:
    """Return the transformers class of a config and its defaults; ViT's if none is named."""
    named = rule.get("image_processor_type") or rule.get("feature_extractor_type")
    if named is None:
        name = _CLASS_OF_MODEL.get(str(model_type), "ViT" if model_type is None else "")
    else:
        name = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(named))
    if name in _REFUSED:
        raise ConfigError(
            f"{name}ImageProcessor {_REFUSED[name]}, which vitlib does not do: make pixels of the "
            "model's size yourself, or give image_processor=ImageProcessor(...)"
        )
    if name not in _CLASSES:
        kind = f"image_processor_type {named!r}" if named is not None else f"model {model_type!r}"
        raise ConfigError(f"{kind} is not known: vitlib follows those of {', '.join(_CLASSES)}")
    return name, _CLASSES[name]


def _null_error(key: str, name: str, *, has_default: bool) -> str:
    """Return the error message for a key without a value, of a step that is done."""
    step = next(step for step, keys in _KEYS.items() if key in keys)
    if not has_default:
        return (
            f"{step} is true without a {key}, and {name}ImageProcessor has no default of it: put "
            "one into preprocessor_config.json"
        )
    return (
        f"{key} is null, and {step} is true: put a value into preprocessor_config.json, or take "
        f"the key out for the default of {name}ImageProcessor"
    )


def _read_size(size: Any, *, square: bool) -> tuple[tuple[int, int] | None, int | None]:
    """Parse `size` of any version into (size, shortest_edge), one of them None."""
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return None, to_pair("size", size["shortest_edge"])[0]
    if isinstance(size, int) and not square:
        return None, to_pair("size", size)[0]
    return _read_pair("size", size), None


def _read_pair(name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        if set(size) != {"height", "width"}:
            raise ConfigError(f"{name} has {', '.join(map(str, size))}: expected height and width")
        size = (size["height"], size["width"])
    return to_pair(name, size)


def _convnext(
    shortest_edge: int, crop_pct: Any
) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """Return ConvNext's size, shortest_edge and crop: below 384 a crop, from there a squash."""
    crop_pct = 224 / 256 if crop_pct is None else crop_pct
    if not is_number(crop_pct) or not 0 < crop_pct <= 1:
        raise ConfigError(f"crop_pct={crop_pct!r}: expected a number above 0 and at most 1")
    both = (shortest_edge, shortest_edge)
    return (
        (None, int(shortest_edge / crop_pct), both) if shortest_edge < 384 else (both, None, None)
    )
