"""Compare the sizes in timm's config.json with those of the tensors.

timm builds its model from the config and loads the tensors strictly, except for three parts. It
resamples the patch kernel and the positions, and draws a random head if num_classes of model_args
and of the config differ. The tensors do not tell which of the two sizes is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitlib.checkpoint.layouts.infer import compact_size
from vitlib.checkpoint.layouts.timm_models import Architecture
from vitlib.errors import CheckpointError, ConfigError, is_number, to_pair
from vitlib.image.configs.timm import timm_input_size

# timm rounds the width of DINOv3's gated MLPs up to a multiple of 8, that of the 7B model of 64.
_ALIGN = {"vit_7b_patch16_dinov3": 64}
_DEFAULT_ALIGN = 8
# timm builds the architectures with these words in their names with dynamic_img_size by default.
_DYNAMIC = ("_radio_", "test_vit")


def check_sizes(
    model: Architecture, config: Mapping[str, Any], inferred: Mapping[str, Any], is_split: bool
) -> None:
    """Reject a config that states another size than the tensors have.

    Args:
        model: The architecture that the config names.
        config: timm's config.json, with model_args as an object where it has them.
        inferred: Fields of ViTConfig that the tensors determine.
        is_split: The gate of an MLP is a separate tensor in the file.

    Raises:
        CheckpointError: A size contradicts the tensors.
    """
    args = config.get("model_args") or {}
    per_width, align = _mlp_rounding(model, args, inferred, is_split)
    ratio = args.get("mlp_ratio")
    hidden = int(inferred["embed_dim"] * ratio) if is_number(ratio) else None
    stated = {
        "patch_size": to_pair("patch_size", args["patch_size"]) if args.get("patch_size") else None,
        "in_chans": args.get("in_chans"),
        "embed_dim": args.get("embed_dim"),
        "depth": args.get("depth"),
        "mlp_ratio": hidden if hidden is None else hidden + -hidden % align,
        "num_classes": args.get("num_classes"),
    }
    if inferred["class_token"] and inferred["pos_embed"] and "no_embed_class" in args:
        stated["no_embed_class"] = bool(args["no_embed_class"])
    tensors = {
        "patch_size": inferred["patch_size"],
        "in_chans": inferred["in_channels"],
        "embed_dim": inferred["embed_dim"],
        "depth": inferred["depth"],
        "mlp_ratio": inferred["mlp_dim"] * per_width,
        "num_classes": inferred["num_classes"],
        "no_embed_class": not inferred["pos_embed_cls"],
    }
    shown = tensors | {
        "patch_size": compact_size(inferred["patch_size"]),
        "mlp_ratio": f"{tensors['mlp_ratio'] / inferred['embed_dim']:g}",
    }
    rounded = {"mlp_ratio": f" with swiglu_align_to {align}"} if align > 1 else {}
    clashes = [
        f"{name} {args[name]!r}{rounded.get(name, '')} (the tensors have {shown[name]})"
        for name, value in stated.items()
        if value is not None and value != tensors[name]
        if name != "mlp_ratio"
        or abs(value - tensors[name]) > 1  # a rounded ratio changes int() by 1
    ]
    classes = _num_classes(config, inferred)
    if classes not in (None, inferred["num_classes"], stated["num_classes"]):
        clashes.append(f"num_classes {classes!r} (the tensors have {inferred['num_classes']})")
    if clashes:
        raise CheckpointError(f"config.json contradicts the tensors: {'; '.join(clashes)}")


def _mlp_rounding(
    model: Architecture, args: Mapping[str, Any], inferred: Mapping[str, Any], is_split: bool
) -> tuple[int, int]:
    """Return embed_dim * mlp_ratio / mlp_dim, and the number that the product is rounded up to."""
    is_rotary = model.facts["rope"] is not None
    if is_split and is_rotary:
        usual = _DEFAULT_ALIGN if model.facts["rope"].coords == "centers" else 1
        align = args.get("swiglu_align_to", _ALIGN.get(model.name, usual))
        return 1, align if isinstance(align, int) and align > 0 else 1
    # The packed MLP of VisionTransformer halves the width for its two parts; Eva doubles it first.
    return 2 if inferred.get("activation") == "swiglu" and not is_split and not is_rotary else 1, 1


def _num_classes(config: Mapping[str, Any], inferred: Mapping[str, Any]) -> Any:
    """Return num_classes as timm reads it: of the top level, else of pretrained_cfg, else None."""
    pretrained = config.get("pretrained_cfg")
    inner = pretrained.get("num_classes") if isinstance(pretrained, dict) else None
    classes = config.get("num_classes", inner)
    if config.get("model_type") == "timm_wrapper" and not inferred["num_classes"]:
        return None  # for a model without a head, transformers writes the number of labels
    return None if is_number(classes) and classes < 0 else classes  # timm ignores negative numbers


def list_input_notes(
    model: Architecture, config: Mapping[str, Any], inferred: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return a line if photos are prepared at another size than img_size of model_args.

    Args:
        model: The architecture that the config names.
        config: timm's config.json, with model_args and pretrained_cfg as objects if it has them.
        inferred: Fields of ViTConfig that the tensors determine.

    Returns:
        The line; nothing if timm accepts such photos.

    Raises:
        CheckpointError: The tensors have a third size, for which timm resamples positions twice.
    """
    args, pretrained = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    has_positions = inferred["pos_embed"] or inferred["relative_position"]
    if not args.get("img_size") or not pretrained.get("input_size") or not has_positions:
        return ()
    try:
        prepared = to_pair("input_size", timm_input_size(config)[1:])
    # Preprocessing reports this error; the model does not need the size.
    except ConfigError:
        return ()
    size = to_pair("img_size", args["img_size"])
    if prepared == size:
        return ()
    stated, photos = args["img_size"], "x".join(map(str, prepared))
    if inferred["image_size"] != size:
        raise CheckpointError(
            f"config.json contradicts the tensors: img_size {stated!r} (the tensors have "
            f"{compact_size(inferred['image_size'])}), and photos are prepared at {photos}, for "
            "which timm resamples the positions twice: set img_size of its model_args to "
            f"{compact_size(inferred['image_size'])}"
        )
    if args.get("dynamic_img_size", any(word in model.name for word in _DYNAMIC)):
        return ()
    return (
        f"config.json prepares photos at {photos} for a model of img_size {stated!r}, which timm "
        "refuses unless dynamic_img_size is true: vitlib resamples the positions to the photos",
    )


def get_object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an object inside a config.

    Args:
        config: timm's config.json.
        key: Key of the object.

    Returns:
        The object; empty if there is none.

    Raises:
        CheckpointError: The value is no object.
    """
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json has {key} {value!r}: expected an object")
    return value


def get_position_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the size of the positions.

    Args:
        config: timm's config.json.

    Returns:
        Pixels (height, width); None if the config does not give them.

    Raises:
        CheckpointError: model_args or pretrained_cfg is no object.
        ConfigError: The size is no pair of numbers.
    """
    args, defaults = (get_object(config, key) for key in ("model_args", "pretrained_cfg"))
    shape = defaults.get("input_size")
    size = args.get("img_size") or (shape[1:] if isinstance(shape, list) else None)
    sizes = tuple(size) if isinstance(size, list | tuple) else (size,)
    return to_pair("img_size", size) if size and None not in sizes else None


def compute_mlp_ratio(hidden: int, width: int) -> float:
    """Return the mlp_ratio for which timm's int(width * ratio) is the hidden width.

    Args:
        hidden: Hidden width of the MLP.
        width: Width of the model.

    Returns:
        The ratio.
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
