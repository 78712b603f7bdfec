"""The torchvision layout: a ViT's state dict, `class_token`, `conv_proj`, `encoder.layers...`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vitlib.checkpoint.families import guess_num_heads, with_profile
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


def find(names: Iterable[str]) -> NameMatch:
    """Which of a file's tensors are which of ours."""
    return match_names(names, (_OWN, _LEGACY))


# torchvision 0.28's models: width, patch, heads, and the weights of each image size. Of two that
# have the same tensors, the first is assumed.
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


def read(json: Json, shapes: Mapping[str, Shape], _: NameMatch, facts: Facts) -> ParsedConfig:
    """The shapes -> what the model is; nothing else in such a file says it."""
    held = infer_config(shapes, sidecar_size(json))
    held["pool"] = "pooler" if held["pooler_dim"] else "cls"
    name = find_architecture(held["embed_dim"], held["patch_size"])
    if facts.architecture is not None:
        _refuse_others(facts.architecture, held)
    held["num_heads"] = _PUBLISHED[name][2] if name else guess_num_heads(held["embed_dim"], "vit")
    cfg = with_profile(ViTConfig(family="vit", **held), "torchvision")
    tags = get_weight_tags(cfg)
    doubtful = () if name else ("num_heads",)
    notes: tuple[str, ...] = ()
    if len(tags) > 1 and "." not in (facts.architecture or ""):
        other = f"architecture='{name}.{tags[1]}' (--architecture)"
        notes = (f"preprocessing is that of {tags[0]}, give {other} where these are the weights",)
    return ParsedConfig(
        cfg, ("num_heads", "norm_eps", "activation", "position_resize"), doubtful, notes
    )


def find_architecture(embed_dim: int, patch_size: tuple[int, int]) -> str:
    """Return torchvision's name of the model of this width and patch, or ""."""
    for name, (width, patch, _, _) in _PUBLISHED.items():
        if (width, (patch, patch)) == (embed_dim, patch_size):
            return name
    return ""


# With a checksum, as torchvision names its files, or with the part that only SWAG weights have.
_FILE = re.compile(r"(?<![a-z0-9])(vit_[blh]_\d\d)(_lc_swag|_swag)?(-[0-9a-f]{8})?(?![a-z0-9_])")
_TAGS = {None: _V1, "_lc_swag": _LINEAR, "_swag": _E2E}


def parse_file_name(file_name: str, shapes: Mapping[str, Shape]) -> str | None:
    """Return the architecture that a published file's name states; None where it states none, or
    one that has other tensors."""
    match = _FILE.search(file_name.lower())
    if match is None or not (match.group(2) or match.group(3)):
        return None
    name, tag = match.group(1), _TAGS[match.group(2)]
    held = infer_config(shapes, None)
    try:
        _refuse_others(f"{name}.{tag}", held)
    except CheckpointError:
        return None
    return f"{name}.{tag}"


def get_weight_tags(cfg: ViTConfig) -> tuple[str, ...]:
    """Return the names of the weights that torchvision has of a model at its image size."""
    name = find_architecture(cfg.embed_dim, cfg.patch_size)
    return _PUBLISHED[name][3].get(max(cfg.image_size), ()) if name else ()


def choose_preprocessing(cfg: ViTConfig, architecture: str | None) -> str:
    """Return the name, in configs/profiles.py, of how torchvision prepares images for a model."""
    tag = (architecture or "").partition(".")[2] or next(iter(get_weight_tags(cfg)), "")
    if tag == _LINEAR:
        return "swag"
    name = find_architecture(cfg.embed_dim, cfg.patch_size)
    return "vit_l_16" if (name, tag) == ("vit_l_16", _V1) else cfg.family


def _refuse_others(stated: str, held: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the tensors are not those of a stated model."""
    name, _, tag = stated.partition(".")
    if name not in _PUBLISHED:
        raise CheckpointError(
            f"architecture={stated!r}: torchvision's are {', '.join(_PUBLISHED)}, and each may "
            f"have its weights' name behind it: vit_b_16.{_LINEAR}"
        )
    width, patch, _, sizes = _PUBLISHED[name]
    if (width, (patch, patch)) != (held["embed_dim"], held["patch_size"]):
        raise CheckpointError(f"architecture={stated!r} has other tensors than this file")
    tags = sizes.get(max(held["image_size"]), ())
    if tag and tag not in tags:
        raise CheckpointError(
            f"architecture={stated!r}: weights of this image size are "
            f"{', '.join(tags) or 'none of torchvision'}"
        )


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """The model as the state dict of torchvision's VisionTransformer, in a .pth."""
    state = dict(state)
    if cfg.pool != "pooler":
        state = {name: t for name, t in state.items() if not name.startswith("pooler.")}
    state.pop("patch_embed.mask_token", None)
    wanted: dict[str, tuple[Any, ...]] = {
        "class_token": (True,),
        **BASIC_VIT,
        "pool": ("cls", "pooler"),
        "in_channels": (3,),
        "image_size": ((cfg.image_size[0],) * 2,),
        "patch_size": ((cfg.patch_size[0],) * 2,),
        "attention_pool": (False,),
    }
    check_supported(cfg, wanted, "torchvision's VisionTransformer")
    cfg = add_key_bias(add_class_position(cfg, state), state)
    return Serialized(write_state(state, _OWN, cfg), weights="model.pth")


def file_name(ours: str, cfg: ViTConfig) -> str:  # noqa: ARG001
    """Our name of a tensor -> its name in a file; ours where files have none."""
    return rename(ours, _OWN)


LAYOUT = Layout(
    name="torchvision",
    profile="torchvision",
    find=find,
    read=read,
    write=write,
    file_name=file_name,
)
