"""How rule files say what ImageProcessor does, both ways, and what each library does unasked.

A rule is here a dict of ImageProcessor's fields. Hugging Face's preprocessor_config.json (or the
"image_processor" of its processor_config.json), timm's `pretrained_cfg` and open_clip's
`preprocess_cfg` are read to one and written from one; `lost` says what a file cannot hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from vitlib.config import as_pair, is_number
from vitlib.errors import ConfigError

Fields: TypeAlias = dict[str, Any]
Stats: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
FITS = ("squash", "cover", "contain")
CROP_ROUNDINGS = ("floor", "even", "zero")

IMAGENET: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP: Stats = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# What transformers' classes take where preprocessor_config.json leaves a key out, and whether a
# plain number means a square ("square") or the shorter edge. The key wins wherever it is there.
_COMMON = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_COMMON |= {"mean": HALF[0], "std": HALF[1], "rounding": "floor"}
_CLASSES: dict[str, dict[str, Any]] = {
    "ViT": _COMMON | {"size": 224, "square": True, "resample": 2},
    "DeiT": _COMMON | {"size": 256, "square": True, "resample": 3, "crop": 224},
    "Beit": _COMMON | {"size": 224, "square": True, "resample": 3},
    "Siglip": _COMMON | {"size": (224, 224), "square": False, "resample": 3},
    "ConvNext": _COMMON | {"size": 384, "square": False, "resample": 3},
    "Bit": _COMMON
    | {"size": 224, "square": False, "resample": 3, "crop": 224, "mean": CLIP[0], "std": CLIP[1]},
    # Its one class resizes floats and crops as torchvision does on tensors: halves towards zero.
    "DINOv3ViT": _COMMON
    | {"size": 224, "square": True, "resample": 2, "mean": IMAGENET[0], "std": IMAGENET[1]}
    | {"float": True, "rounding": "zero"},
}
_CLASSES["CLIP"] = _CLASSES["Bit"]
# The class that AutoImageProcessor takes for a model_type where the file names none, and the one
# for the vision tower's own model_type. siglip2 alone is NaFlex; fixed sizes say siglip.
_CLASS_OF_MODEL = {
    **dict.fromkeys(("vit", "vit_mae", "vit_msn", "ijepa"), "ViT"),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), "Bit"),
    **dict.fromkeys(("beit", "data2vec-vision"), "Beit"),
    **dict.fromkeys(("clip", "clip_vision_model"), "CLIP"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "Siglip"),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), "Siglip2"),
    "deit": "DeiT",
    "dinov3_vit": "DINOv3ViT",
}


def find(read: Callable[[str], dict[str, Any] | None]) -> Fields | None:
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
            return hf_fields(_mapping("image_processor", rule), config.get("model_type"))
        name = "config.json"
        # timm keeps the rule in pretrained_cfg; before that it lay beside the architecture.
        older = "architecture" in config and ("input_size" in config or "mean" in config)
        rule = config.get("pretrained_cfg") or (config if older else None)
        if rule is not None:
            return timm_fields(_mapping("pretrained_cfg", rule))
        name = "open_clip_config.json"
        config = read(name) or {}
        return openclip_fields(config) if "preprocess_cfg" in config else None
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def hf_fields(rule: Mapping[str, Any], model_type: object = None) -> Fields:
    """A preprocessor_config.json of any age; model_type serves where it names no class.

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
    mean, std = (_per_channel(get(f"image_{key}", key)) for key in ("mean", "std"))
    normalize = bool(get("do_normalize"))
    return {
        "size": size,
        "shortest_edge": shortest_edge,
        "fit": rule.get("fit", "squash"),
        "resample": get("resample"),
        "float_resize": default.get("float", False),
        "crop_size": crop_size,
        "crop_rounding": get("crop_rounding", "rounding"),
        "fill": _tuple("fill", rule["fill"]) if rule.get("fill") is not None else None,
        "rescale_factor": get("rescale_factor") if get("do_rescale") else None,
        "image_mean": mean if normalize else None,
        "image_std": std if normalize else None,
        "in_channels": len(mean) if normalize else 3,
    }


def hf_rule(fields: Fields) -> dict[str, Any]:
    """The rule as a preprocessor_config.json that transformers 4 and 5 read.

    What transformers has no key for is under vitlib's own, which it passes over: see `lost`.
    """
    kind = "ViT" if fields["crop_size"] is None else "DeiT" if fields["size"] is not None else "Bit"
    kind = "DINOv3ViT" if fields["float_resize"] else kind
    rule: dict[str, Any] = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": fields["size"] is not None or fields["shortest_edge"] is not None,
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
    if fields["fill"] is not None:
        rule["fill"] = list(fields["fill"])
    return rule


def timm_fields(rule: Mapping[str, Any]) -> Fields:
    """timm's `pretrained_cfg` as its evaluation transform follows it, missing keys as it has them.

    Raises ConfigError for what vitlib does not do, or cannot be done.
    """

    def get(key: str, default: Any) -> Any:
        return rule.get(key) or default

    shape = _tuple("input_size", get("input_size", (3, 224, 224)))
    if len(shape) != 3:
        raise ConfigError(f"input_size={shape}: expected (channels, height, width)")
    channels, target = as_pair("input_size", shape[0])[0], as_pair("input_size", shape[1:])
    mode, crop_pct = get("crop_mode", "center"), get("crop_pct", 0.875)
    if mode not in ("center", "squash", "border"):
        raise ConfigError(f"crop_mode={mode!r}: expected center, squash or border")
    if not is_number(crop_pct) or not 0.01 <= crop_pct <= 100:
        raise ConfigError(f"crop_pct={crop_pct!r}: expected a number in 0.01..100")
    scaled = (math.floor(target[0] / crop_pct), math.floor(target[1] / crop_pct))
    stats = [_tuple(key, get(key, IMAGENET[i])) for i, key in enumerate(("mean", "std"))]
    fields = _like_torchvision(scaled, target, _resample(get("interpolation", "bicubic")), stats)
    fields["in_channels"] = channels
    if mode != "center":
        fields |= {"size": scaled, "shortest_edge": None, "fit": "squash"}
    if mode == "squash" and scaled == target:
        fields["crop_size"] = None
    if mode == "border":
        levels = tuple(round(255 * value) if is_number(value) else 0 for value in stats[0])
        fields |= {"fit": "contain", "fill": levels}
    return fields


def timm_rule(fields: Fields) -> dict[str, Any]:
    """The keys of timm's `pretrained_cfg` that say the rule, as near as they can: see `lost`."""
    target = _target(fields)
    scaled = fields["size"] or (fields["shortest_edge"] or min(target),) * 2
    mode = {"squash": "squash", "cover": "center", "contain": "border"}[fields["fit"]]
    mode = "center" if fields["size"] is None else mode
    # timm divides by the share and rounds down. The shortest share that leads back is the one
    # somebody meant: 0.9 makes 248 of 224, and 224 / 248 is 0.9032.
    share = max(target[i] / scaled[i] for i in (0, 1))
    shares = (round(share, 2), round(share, 3), share, min(target[i] / scaled[i] for i in (0, 1)))
    want = scaled if mode != "center" or fields["fit"] == "cover" else (scaled[0],) * 2
    wanted = [s for s in shares if s and _scaled(target, s) == want] or [share]
    mean, std = _mean_std(fields)
    return {
        "input_size": [fields["in_channels"], *target],
        "interpolation": RESAMPLE[fields["resample"]],
        "crop_pct": wanted[0],
        "crop_mode": mode,
        "mean": mean,
        "std": std,
    }


def openclip_fields(config: Mapping[str, Any]) -> Fields:
    """The `preprocess_cfg` in an open_clip_config.json, at the size of the model's images.

    Raises ConfigError for what vitlib does not do, or cannot be done.
    """
    rule = _mapping("preprocess_cfg", config.get("preprocess_cfg") or {})
    model = _mapping("model_cfg", config.get("model_cfg") or {})
    vision = _mapping("vision_cfg", model.get("vision_cfg") or {})
    # open_clip takes the tower's size over the rule's.
    target = as_pair("size", vision.get("image_size") or rule.get("size") or 224)
    mode, name = rule.get("resize_mode") or "shortest", rule.get("interpolation") or "bicubic"
    if mode not in ("shortest", "longest", "squash"):
        raise ConfigError(f"resize_mode={mode!r}: expected shortest, longest or squash")
    if rule.get("mode") not in (None, "RGB"):
        raise ConfigError(f"mode={rule['mode']!r}: expected RGB")
    stats = [_per_channel(rule.get(key) or CLIP[i]) for i, key in enumerate(("mean", "std"))]
    resample = 3 if name == "random" else _resample(name)
    fields = _like_torchvision(target, target, resample, stats)
    if mode == "squash":
        fields |= {"size": target, "shortest_edge": None, "fit": "squash", "crop_size": None}
    elif mode == "longest":
        fill = (rule.get("fill_color") or 0,) * 3
        fields |= {"size": target, "shortest_edge": None, "fit": "contain", "fill": fill}
    return fields


def openclip_rule(fields: Fields) -> dict[str, Any]:
    """open_clip's `preprocess_cfg`, as near as it can say the rule: see `lost`."""
    target = _target(fields)
    mode = {"squash": "squash", "cover": "shortest", "contain": "longest"}[fields["fit"]]
    mean, std = _mean_std(fields)
    return {
        "size": target[0] if target[0] == target[1] else list(target),
        "mode": "RGB",
        "mean": mean,
        "std": std,
        "interpolation": "bilinear" if fields["resample"] == 2 else "bicubic",
        "resize_mode": "shortest" if fields["size"] is None else mode,
        "fill_color": fields["fill"][0] if fields["fill"] else 0,
    }


def lost(fields: Fields, layout: str) -> list[str]:
    """What of a rule a library's file cannot hold, a line each: "hf", "timm" or "openclip"."""
    readers: dict[str, Callable[[], Fields]] = {
        "hf": lambda: hf_fields(_known_to_hf(hf_rule(fields))),
        "timm": lambda: timm_fields(timm_rule(fields)),
        "openclip": lambda: openclip_fields({"preprocess_cfg": openclip_rule(fields)}),
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
    return {k: v for k, v in rule.items() if k not in ("crop_rounding", "fit", "fill")}


def _canonical(fields: Fields) -> Fields:
    """The fields, with those that change no pixel at one value."""
    same = dict(fields)
    if same["image_mean"] is not None and not any(same["image_mean"]):
        if all(value == 1 for value in same["image_std"]):
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


def _like_torchvision(
    scaled: tuple[int, int], target: tuple[int, int], resample: int, stats: list[tuple[Any, ...]]
) -> Fields:
    """Resize so that it covers `scaled`, then cut `target` out, as timm and open_clip do."""
    square = scaled[0] == scaled[1]
    return {
        "size": None if square else scaled,
        "shortest_edge": scaled[0] if square else None,
        "fit": "squash" if square else "cover",
        "resample": resample,
        "float_resize": False,
        "crop_size": target,
        "crop_rounding": "even",
        "fill": None,
        "rescale_factor": 1 / 255,
        "image_mean": stats[0],
        "image_std": stats[1],
        "in_channels": 3,
    }


def _scaled(target: tuple[int, int], share: float) -> tuple[int, int]:
    return math.floor(target[0] / share), math.floor(target[1] / share)


def _target(fields: Fields) -> tuple[int, int]:
    """The (height, width) that comes out, or the nearest to it where that hangs on the image."""
    pair = fields["crop_size"] or fields["size"] or (fields["shortest_edge"] or 224,) * 2
    return (pair[0], pair[1])


def _mean_std(fields: Fields) -> tuple[list[float], list[float]]:
    if fields["image_mean"] is None:
        return [0.0] * fields["in_channels"], [1.0] * fields["in_channels"]
    return list(fields["image_mean"]), list(fields["image_std"])


def _resample(name: object) -> int:
    codes = [code for code, known in RESAMPLE.items() if known == name]
    if not codes:
        raise ConfigError(f"interpolation={name!r}: expected one of {', '.join(RESAMPLE.values())}")
    return codes[0]


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is a {type(value).__name__}: expected an object")
    return value


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name}={value!r}: expected a list")
    return tuple(value)


def _per_channel(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * 3
