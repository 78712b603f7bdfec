"""The layout of torchvision's ViTs: `class_token`, `conv_proj`, `encoder.layers...`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vitlib.checkpoint.families import default_num_heads, with_profile
from vitlib.checkpoint.layouts.equivalences import (
    BASIC_VIT,
    add_class_position,
    add_key_bias,
    check_supported,
)
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import Shape, infer_config
from vitlib.checkpoint.layouts.layout import Json, Layout, ParsedConfig, Serialized, sidecar_size
from vitlib.checkpoint.layouts.table import (
    NameMatch,
    Table,
    fused_qkv,
    match_names,
    rename,
    write_state,
)
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError

_BLOCK = "encoder.layers.encoder_layer_{}"
_OWN: Table = {
    "patch_embed.cls_token": "class_token",
    "patch_embed.proj": "conv_proj",
    "patch_embed.pos_embed": "encoder.pos_embedding",
    "blocks.{}.norm1": f"{_BLOCK}.ln_1",
    **fused_qkv("blocks.{}.attn", f"{_BLOCK}.self_attention.in_proj"),
    "blocks.{}.attn.proj": f"{_BLOCK}.self_attention.out_proj",
    "blocks.{}.norm2": f"{_BLOCK}.ln_2",
    "blocks.{}.mlp.fc1": f"{_BLOCK}.mlp.0",
    "blocks.{}.mlp.fc2": f"{_BLOCK}.mlp.3",
    "norm": "encoder.ln",
    "pooler": "heads.pre_logits",
    "head": "heads.head",
}
_LEGACY: Table = {
    "blocks.{}.mlp.fc1": f"{_BLOCK}.mlp.linear_1",
    "blocks.{}.mlp.fc2": f"{_BLOCK}.mlp.linear_2",
}


def _find(names: Iterable[str]) -> NameMatch:
    """Match names of the state dict, older ones too."""
    return match_names(names, (_OWN, _LEGACY))


# The models of torchvision 0.28: width, patch, heads, and the weights for each image size. Where
# two weights have the same shapes, the first is assumed.
_V1, _LINEAR, _E2E = (
    "IMAGENET1K_V1",
    "IMAGENET1K_SWAG_LINEAR_V1",
    "IMAGENET1K_SWAG_E2E_V1",
)
_PUBLISHED: Mapping[str, tuple[int, int, int, Mapping[int, tuple[str, ...]]]] = {
    "vit_b_16": (768, 16, 12, {224: (_V1, _LINEAR), 384: (_E2E,)}),
    "vit_b_32": (768, 32, 12, {224: (_V1,)}),
    "vit_l_16": (1024, 16, 16, {224: (_V1, _LINEAR), 512: (_E2E,)}),
    "vit_l_32": (1024, 32, 16, {224: (_V1,)}),
    "vit_h_14": (1280, 14, 16, {224: (_LINEAR,), 518: (_E2E,)}),
}


def _read(json: Json, shapes: Mapping[str, Shape], _: NameMatch, facts: Facts) -> ParsedConfig:
    """Infer the config from the shapes; the number of heads is that of the published model."""
    inferred = infer_config(shapes, sidecar_size(json))
    inferred["pool"] = "pooler" if inferred["pooler_dim"] else "cls"
    name = find_architecture(inferred["embed_dim"], inferred["patch_size"])
    if facts.architecture is not None:
        _check_architecture(facts.architecture, inferred)
    inferred["num_heads"] = (
        _PUBLISHED[name][2] if name else default_num_heads(inferred["embed_dim"], "vit")
    )
    cfg = with_profile(ViTConfig(family="vit", **inferred), "torchvision")
    tags = get_weight_tags(cfg)
    doubtful = () if name else ("num_heads",)
    notes: tuple[str, ...] = ()
    if len(tags) > 1 and "." not in (facts.architecture or ""):
        other = f"architecture='{name}.{tags[1]}' (--architecture)"
        notes = (f"preprocessing is that of {tags[0]}: for the other weights give {other}",)
    return ParsedConfig(
        cfg, ("num_heads", "norm_eps", "activation", "position_resize"), doubtful, notes
    )


def find_architecture(embed_dim: int, patch_size: tuple[int, int]) -> str:
    """Return torchvision's name of the model with a width and a patch size.

    Args:
        embed_dim: Width of the model.
        patch_size: Pixels (height, width) of a patch.

    Returns:
        The name; empty if torchvision has no such model.
    """
    for name, (width, patch, _, _) in _PUBLISHED.items():
        if (width, (patch, patch)) == (embed_dim, patch_size):
            return name
    return ""


# A published file has a checksum in its name, or the suffix of SWAG weights. A name with neither
# may be any file's.
_FILE = re.compile(r"(?<![a-z0-9])(vit_[blh]_\d\d)(_lc_swag|_swag)?(-[0-9a-f]{8})?(?![a-z0-9_])")
_TAGS = {None: _V1, "_lc_swag": _LINEAR, "_swag": _E2E}


def parse_file_name(file_name: str, shapes: Mapping[str, Shape]) -> str | None:
    """Return the architecture that the name of a published file states.

    Args:
        file_name: Name of the weights file.
        shapes: Shapes of its tensors by vitlib's names.

    Returns:
        "model.weights"; None if the name states none, or one with other tensors.
    """
    match = _FILE.search(file_name.lower())
    if match is None or not (match.group(2) or match.group(3)):
        return None
    name, tag = match.group(1), _TAGS[match.group(2)]
    inferred = infer_config(shapes, None)
    try:
        _check_architecture(f"{name}.{tag}", inferred)
    except CheckpointError:
        return None
    return f"{name}.{tag}"


def get_weight_tags(cfg: ViTConfig) -> tuple[str, ...]:
    """Return the names of the weights that torchvision has for a model.

    Args:
        cfg: The model's config; its width, patch size and image size decide.

    Returns:
        Names such as "IMAGENET1K_V1"; empty if torchvision has none.
    """
    name = find_architecture(cfg.embed_dim, cfg.patch_size)
    return _PUBLISHED[name][3].get(max(cfg.image_size), ()) if name else ()


def choose_preprocessing(cfg: ViTConfig, architecture: str | None) -> str:
    """Return the name of a model's transform: of its weights or its family.

    Args:
        cfg: The model's config.
        architecture: "model" or "model.weights" as stated; None for the first fitting weights.

    Returns:
        A name for families.get_transform.
    """
    tag = (architecture or "").partition(".")[2] or next(iter(get_weight_tags(cfg)), "")
    if tag == _LINEAR:
        return "swag"
    name = find_architecture(cfg.embed_dim, cfg.patch_size)
    return "vit_l_16" if (name, tag) == ("vit_l_16", _V1) else cfg.family


def _check_architecture(stated: str, inferred: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the tensors are not those of a stated model."""
    name, _, tag = stated.partition(".")
    if name not in _PUBLISHED:
        raise CheckpointError(
            f"architecture={stated!r}: expected one of {', '.join(_PUBLISHED)}, alone or with the "
            f"name of its weights, as vit_b_16.{_LINEAR}"
        )
    width, patch, _, sizes = _PUBLISHED[name]
    if (width, (patch, patch)) != (inferred["embed_dim"], inferred["patch_size"]):
        raise CheckpointError(
            f"architecture={stated!r} has other tensors than this file: expected width {width} and "
            f"patches of {patch}; state another one"
        )
    tags = sizes.get(max(inferred["image_size"]), ())
    if tag and tag not in tags:
        raise CheckpointError(
            f"architecture={stated!r}: expected weights for this image size: "
            f"{', '.join(tags) or 'torchvision has none; leave the name of the weights out'}"
        )


def _write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write the state dict of torchvision's VisionTransformer, in a .pth."""
    state = dict(state)
    if cfg.pool != "pooler":
        state = {name: t for name, t in state.items() if not name.startswith("pooler.")}
    state.pop("patch_embed.mask_token", None)
    supported: dict[str, tuple[Any, ...]] = {
        "class_token": (True,),
        **BASIC_VIT,
        "pool": ("cls", "pooler"),
        "in_channels": (3,),
        "image_size": ((cfg.image_size[0],) * 2,),
        "patch_size": ((cfg.patch_size[0],) * 2,),
        "attention_pool": (None,),
    }
    check_supported(cfg, supported, "torchvision's VisionTransformer")
    cfg = add_key_bias(add_class_position(cfg, state), state)
    return Serialized(write_state(state, _OWN, cfg), weights="model.pth")


def _file_name(name: str, cfg: ViTConfig) -> str:  # noqa: ARG001
    """Return a tensor's name in a file; its own where files have none."""
    return rename(name, _OWN)


LAYOUT = Layout(
    name="torchvision",
    profile="torchvision",
    find=_find,
    read=_read,
    write=_write,
    file_name=_file_name,
)
