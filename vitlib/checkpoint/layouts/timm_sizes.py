"""The sizes that timm's config.json states, compared with those of the tensors.

timm builds its model from the config and loads the tensors strictly, but for the patch kernel and
the positions, which it resamples, and for the head, which it draws at random where num_classes of
model_args and that of the config differ. The tensors alone do not tell which was meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitlib.checkpoint.layouts.infer import compact_size
from vitlib.checkpoint.layouts.timm_models import Architecture
from vitlib.config import is_number, to_pair
from vitlib.errors import CheckpointError, ConfigError
from vitlib.image.configs.timm import timm_input_size

# timm rounds the width of DINOv3's gated MLPs up to a multiple of 8, and the largest one's to 64.
_ALIGN = {"vit_7b_patch16_dinov3": 64}
_USUAL_ALIGN = 8
# In the names of the models that timm builds with dynamic_img_size unasked.
_DYNAMIC = ("_radio_", "test_vit")


def check_sizes(
    model: Architecture, config: Mapping[str, Any], held: Mapping[str, Any], is_split: bool
) -> None:
    """Refuse a config that states another size than the tensors have.

    Args:
        model: The architecture that the config names.
        config: timm's config.json, with model_args as an object where it has them.
        held: What the tensors say, as fields of ViTConfig.
        is_split: The file has the gate of an MLP as a tensor of its own.

    Raises:
        CheckpointError: A size contradicts the tensors.
    """
    args = config.get("model_args") or {}
    per_width, align = _mlp_rounding(model, args, held, is_split)
    ratio = args.get("mlp_ratio")
    hidden = int(held["embed_dim"] * ratio) if is_number(ratio) else None
    stated = {
        "patch_size": to_pair("patch_size", args["patch_size"]) if args.get("patch_size") else None,
        "in_chans": args.get("in_chans"),
        "embed_dim": args.get("embed_dim"),
        "depth": args.get("depth"),
        "mlp_ratio": hidden if hidden is None else hidden + -hidden % align,
        "num_classes": args.get("num_classes"),
    }
    if held["class_token"] and held["pos_embed"] and "no_embed_class" in args:
        stated["no_embed_class"] = bool(args["no_embed_class"])
    tensors = {
        "patch_size": held["patch_size"],
        "in_chans": held["in_channels"],
        "embed_dim": held["embed_dim"],
        "depth": held["depth"],
        "mlp_ratio": held["mlp_dim"] * per_width,
        "num_classes": held["num_classes"],
        "no_embed_class": not held["pos_embed_cls"],
    }
    shown = tensors | {
        "patch_size": compact_size(held["patch_size"]),
        "mlp_ratio": f"{tensors['mlp_ratio'] / held['embed_dim']:g}",
    }
    rounded = {"mlp_ratio": f" with swiglu_align_to {align}"} if align > 1 else {}
    clashes = [
        f"{name} {args[name]!r}{rounded.get(name, '')} (the tensors have {shown[name]})"
        for name, value in stated.items()
        if value is not None and value != tensors[name]
        if name != "mlp_ratio" or abs(value - tensors[name]) > 1  # int() of a rounded ratio
    ]
    classes = _num_classes(config, held)
    if classes not in (None, held["num_classes"], stated["num_classes"]):
        clashes.append(f"num_classes {classes!r} (the tensors have {held['num_classes']})")
    if clashes:
        raise CheckpointError(f"config.json contradicts the tensors: {'; '.join(clashes)}")


def _mlp_rounding(
    model: Architecture, args: Mapping[str, Any], held: Mapping[str, Any], is_split: bool
) -> tuple[int, int]:
    """Return how many mlp_dim are embed_dim * mlp_ratio, and of what the latter is a multiple."""
    is_rotary = model.facts["rope_theta"] is not None
    if is_split and is_rotary:
        align = args.get("swiglu_align_to", _ALIGN.get(model.name, _USUAL_ALIGN))
        return 1, align if isinstance(align, int) and align > 0 else 1
    # VisionTransformer's packed MLP halves the width for its two parts; Eva's doubles it before.
    return 2 if held.get("activation") == "swiglu" and not is_split and not is_rotary else 1, 1


def _num_classes(config: Mapping[str, Any], held: Mapping[str, Any]) -> Any:
    """Return num_classes as timm reads it, of the top level before pretrained_cfg; None: unsaid."""
    rule = config.get("pretrained_cfg")
    inner = rule.get("num_classes") if isinstance(rule, dict) else None
    classes = config.get("num_classes", inner)
    if config.get("model_type") == "timm_wrapper" and not held["num_classes"]:
        return None  # transformers writes how many labels there are beside a model without a head
    return None if is_number(classes) and classes < 0 else classes  # timm reads those as unsaid


def list_input_notes(
    model: Architecture, config: Mapping[str, Any], held: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return a line where photos are prepared for another size than img_size of model_args.

    Args:
        model: The architecture that the config names.
        config: timm's config.json, with model_args and pretrained_cfg as objects if it has them.
        held: What the tensors say, as fields of ViTConfig.

    Returns:
        The line, or nothing where timm takes such photos.

    Raises:
        CheckpointError: The tensors have a third size, so that timm resamples positions twice.
    """
    args, rule = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    has_positions = held["pos_embed"] or held["relative_position"]
    if not args.get("img_size") or not rule.get("input_size") or not has_positions:
        return ()
    try:
        prepared = to_pair("input_size", timm_input_size(config)[1:])
    except ConfigError:  # whoever asks for pixels gets this error; a model needs none
        return ()
    size = to_pair("img_size", args["img_size"])
    if prepared == size:
        return ()
    told, photos = args["img_size"], "x".join(map(str, prepared))
    if held["image_size"] != size:
        raise CheckpointError(
            f"config.json contradicts the tensors: img_size {told!r} (the tensors have "
            f"{compact_size(held['image_size'])}), and photos are prepared at {photos}, for which "
            "timm resamples the positions twice: set img_size of its model_args to "
            f"{compact_size(held['image_size'])}"
        )
    if args.get("dynamic_img_size", any(word in model.name for word in _DYNAMIC)):
        return ()
    return (
        f"config.json prepares photos at {photos} for a model of img_size {told!r}, which timm "
        "refuses unless dynamic_img_size is true: vitlib resamples the positions to the photos",
    )
