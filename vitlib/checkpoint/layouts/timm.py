"""The layout of timm: its names, most of which the original code shares, and its config.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitlib.checkpoint.families import get_family
from vitlib.checkpoint.layouts.computed import check_computed_tensors
from vitlib.checkpoint.layouts.equivalences import (
    add_key_bias,
    check_supported,
    convert_projection_to_head,
    fold_class_position,
    fold_register_positions,
)
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.infer import Shape
from vitlib.checkpoint.layouts.layout import Json, Layout, ParsedConfig, Serialized, sidecar_size
from vitlib.checkpoint.layouts.table import (
    NameMatch,
    Slice,
    Table,
    match_names,
    rename,
    write_state,
)
from vitlib.checkpoint.layouts.timm_config import get_position_size, infer_family
from vitlib.checkpoint.layouts.timm_config import read_tower as read_tower
from vitlib.checkpoint.layouts.timm_models import (
    FACTS,
    SIZES,
    STRUCTURE,
    get_architecture,
    match_tensors,
    normalize_name,
)
from vitlib.config import ViTConfig
from vitlib.errors import ConfigError

# The tables without an underscore are also rows of the original code (meta.py).
QKV: Table = {
    f"blocks.{{}}.attn.{name}": Slice("blocks.{}.attn.qkv", part, 3)
    for part, name in enumerate("qkv")
}
TRUNK: Table = {
    "patch_embed.cls_token": "cls_token",
    "patch_embed.dist_token": "dist_token",
    "patch_embed.pos_embed": "pos_embed",
    "patch_embed.proj": "patch_embed.proj",
    "blocks.{}.norm1": "blocks.{}.norm1",
    **QKV,
    "blocks.{}.attn.proj": "blocks.{}.attn.proj",
    "blocks.{}.norm2": "blocks.{}.norm2",
    "blocks.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "norm": "norm",
    "head": "head",
    "head_dist": "head_dist",
}
LAYER_SCALE: Table = {
    "blocks.{}.ls1.gamma": "blocks.{}.ls1.gamma",
    "blocks.{}.ls2.gamma": "blocks.{}.ls2.gamma",
}
GAMMAS: Table = {
    "blocks.{}.ls1.gamma": "blocks.{}.gamma_1",
    "blocks.{}.ls2.gamma": "blocks.{}.gamma_2",
}
# Eva models without a key bias have one bias for queries and one for values.
Q_AND_V: Table = {
    "blocks.{}.attn.q.bias": "blocks.{}.attn.q_bias",
    "blocks.{}.attn.v.bias": "blocks.{}.attn.v_bias",
    **{
        f"{name}.weight": piece._replace(name=piece.name + ".weight")
        for name, piece in QKV.items()
        if isinstance(piece, Slice)
    },
}
SHARED: Table = {"attn_position.tables.0": "rel_pos_bias.relative_position_bias_table"}
POOLED_NORM: Table = {"norm": "fc_norm"}
_GATE: Table = {"blocks.{}.mlp.fc1": ("blocks.{}.mlp.fc1_g", "blocks.{}.mlp.fc1_x")}
_OWN: Table = {
    **TRUNK,
    **LAYER_SCALE,
    "patch_embed.reg_token": "reg_token",
    "norm_pre": "norm_pre",
    "attn_pool.probe": "attn_pool.latent",
    "attn_pool.q": "attn_pool.q",
    "attn_pool.k": Slice("attn_pool.kv", 0, 2),
    "attn_pool.v": Slice("attn_pool.kv", 1, 2),
    "attn_pool.proj": "attn_pool.proj",
    "attn_pool.norm": "attn_pool.norm",
    "attn_pool.mlp.fc1": "attn_pool.mlp.fc1",
    "attn_pool.mlp.fc2": "attn_pool.mlp.fc2",
    "attn_position.tables.{}": "blocks.{}.attn.relative_position_bias_table",
}
_SPLIT: Table = {f"blocks.{{}}.attn.{name}": f"blocks.{{}}.attn.{name}_proj" for name in "qkv"}
_READ = (_OWN, GAMMAS, Q_AND_V, _GATE, POOLED_NORM, SHARED, _SPLIT)
_IGNORED = ("*relative_position_index", "*attn.k_bias", "criterion.")
PREFIXES = ("vit.", "model.", "net.", "encoder.")  # of modules that often hold the trunk


def _find(names: Iterable[str]) -> NameMatch:
    """Match names of timm, older ones too."""
    return match_names(names, _READ, prefixes=PREFIXES, ignored=_IGNORED)


def _read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """Parse config.json if there is one, and infer the rest from the shapes."""
    config = json("config.json") or {}
    name = config.get("architecture")
    stated = facts.architecture
    if (
        isinstance(name, str)
        and stated is not None
        and normalize_name(name) != normalize_name(stated)
    ):
        raise ConfigError(
            f"architecture={stated!r}: expected {name!r} as in config.json: leave it out, or give "
            "config=ViTConfig(...)"
        )
    stated_config = config if isinstance(name, str) else {}
    return read_tower(stated_config, shapes, name_match, "timm", facts, _read_image_size(json))


def _prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, or raise CheckpointError if one differs from what vitlib computes."""
    check_computed_tensors(tensors)
    return dict(tensors)


def _read_image_size(json: Json) -> tuple[int, int] | None:
    """Return pixels (height, width) of the positions from the JSON files, or None."""
    config = json("config.json") or {}
    size = get_position_size(config) if isinstance(config.get("architecture"), str) else None
    return sidecar_size(json) or size


def _write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write model.safetensors and config.json, for timm.create_model("local-dir:...")."""
    cfg, state = convert_to_timm(cfg, dict(state))
    config = {
        "architecture": choose_architecture(cfg),
        "num_classes": cfg.num_classes,
        "num_features": cfg.embed_dim,
        "global_pool": {"cls": "token", "mean": "avg", "map": "map"}[cfg.pool],
        "model_args": _model_args(cfg),
        "pretrained_cfg": {
            "input_size": [cfg.in_channels, *cfg.image_size],
            "fixed_input_size": False,
            "num_classes": cfg.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if cfg.dist_head else "head",
        },
    }
    if cfg.labels:
        config["label_names"] = list(cfg.labels)
    return Serialized(write_state(state, build_table(cfg), cfg), json={"config.json": config})


def convert_to_timm(
    cfg: ViTConfig, state: dict[str, Tensor]
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Rewrite a model exactly with the tensors that timm's classes have.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        The config and the tensors.

    Raises:
        ConfigError: timm has no class that computes this model.
    """
    state.pop("patch_embed.mask_token", None)
    cfg = replace(convert_projection_to_head(cfg, state), mask_token=False)
    if cfg.pool != "pooler":
        for name in ("pooler.weight", "pooler.bias"):
            state.pop(name, None)
        cfg = replace(cfg, pooler_dim=0)
    if cfg.pool != "map" and cfg.attention_pool:
        for name in [name for name in state if name.startswith("attn_pool.")]:
            del state[name]
        cfg = replace(cfg, attention_pool=False)
    if cfg.rope_theta is None and cfg.relative_position is None:
        cfg = add_key_bias(cfg, state)
    if cfg.num_registers or cfg.family == "deit3":
        cfg = fold_class_position(cfg, state)
    if cfg.final_norm == "pooled" and cfg.pool == "cls" and cfg.relative_position is None:
        # The norm treats each token alone.
        cfg = replace(cfg, final_norm="tokens")
    supported: dict[str, tuple[Any, ...]] = {
        "pool": ("cls", "mean", "map"),
        "final_norm": ("tokens", "none") if cfg.pool != "mean" else ("tokens", "pooled", "none"),
        "rope_theta": (None, 100.0),
        "projection_dim": (0,),
        "dist_head": (cfg.dist_token,),  # without heads, timm returns the mean of two tokens
    }
    if cfg.rope_theta is None and cfg.relative_position is None:
        supported["patch_bias"] = (not cfg.pre_norm,)
    if cfg.rope_theta is not None or cfg.relative_position is not None:
        supported |= {"activation": ("gelu", "swiglu"), "pre_norm": (False,), "patch_bias": (True,)}
        supported["dist_token"] = (False,)
    if cfg.rope_theta is not None:
        supported |= {"class_token": (True,), "pos_embed": (False,)}
        supported["key_bias"] = (not cfg.qkv_bias, False)
    check_supported(cfg, supported, "timm")
    # The state has a norm that forward does not apply.
    if cfg.final_norm == "none":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    return cfg, state


def choose_architecture(cfg: ViTConfig) -> str:
    """Return an architecture of timm that, with _model_args, computes a model.

    Args:
        cfg: The model's config, with tensors that timm has (convert_to_timm).

    Returns:
        The published name of these sizes if there is one, else one with other sizes.
    """
    return find_published_name(cfg) or _default_architecture(cfg)


def find_published_name(cfg: ViTConfig) -> str | None:
    """Return timm's name of a model, where depth and image size may differ.

    Args:
        cfg: The model's config.

    Returns:
        The name; None if there is none, and for rotary or relative positions.
    """
    if cfg.rope_theta is not None or cfg.relative_position is not None:
        return None
    columns = {name: getattr(cfg, name) for name in (*STRUCTURE, *SIZES) if name != "gated"}
    columns |= {"layer_scale": cfg.layer_scale is not None, "gated": cfg.activation == "swiglu"}
    family = infer_family(columns, _default_architecture(cfg))
    names = [
        model.name
        for model in match_tensors(columns | {"spelling": ""})
        if not model.reason and "/" not in model.name
        if all(model.facts[name] == getattr(cfg, name) for name in FACTS)
        if infer_family(columns, model.name) == family
    ]
    size = f"_{cfg.image_size[0]}"
    return min(names, key=lambda name: (not name.endswith(size), len(name)), default=None)


def _default_architecture(cfg: ViTConfig) -> str:
    """Return an architecture of timm for a model whose sizes timm does not publish."""
    name = get_family(cfg.family).timm_architecture
    if cfg.rope_theta is not None:
        name = "vit_small_plus_patch16_dinov3" if cfg.activation == "swiglu" else name
        return name + ("_qkvb" if cfg.qkv_bias else "")
    if cfg.relative_position is not None:
        return get_family("beit").timm_architecture
    if "beit" in (cfg.family, get_family(cfg.family).hf_twin):  # without relative positions
        return get_family("vit").timm_architecture
    if cfg.pre_norm:
        name = get_family("clip").timm_architecture
        return (
            name.replace("_clip_", "_clip_quickgelu_") if cfg.activation == "quick_gelu" else name
        )
    if cfg.activation == "swiglu":
        reg = "reg4_" if cfg.num_registers else ""
        return f"vit_giant_patch14_{reg}dinov2"
    if cfg.family == "siglip" and cfg.pool != "map":
        return name.replace("siglip", "siglip_gap")
    return name


def _model_args(cfg: ViTConfig) -> dict[str, Any]:
    """Return model_args, with every size of the model."""
    patch = cfg.patch_size[0] if len(set(cfg.patch_size)) == 1 else list(cfg.patch_size)
    hidden = cfg.mlp_dim * (2 if cfg.activation == "swiglu" and cfg.rope_theta is None else 1)
    args: dict[str, Any] = {
        "img_size": list(cfg.image_size),
        "patch_size": patch,
        "in_chans": cfg.in_channels,
        "embed_dim": cfg.embed_dim,
        "depth": cfg.depth,
        "num_heads": cfg.num_heads,
        "mlp_ratio": _compute_mlp_ratio(hidden, cfg.embed_dim),
        "num_classes": cfg.num_classes,
        "global_pool": {"cls": "token", "mean": "avg", "map": "map"}[cfg.pool],
    }
    if cfg.rope_theta is not None:
        aligned = {} if cfg.activation != "swiglu" else {"swiglu_align_to": math.gcd(hidden, 8)}
        return args | {"num_reg_tokens": cfg.num_registers} | aligned
    if cfg.relative_position is not None:
        return args | {
            "use_rel_pos_bias": cfg.relative_position == "block",
            "use_shared_rel_pos_bias": cfg.relative_position == "shared",
            "use_abs_pos_emb": cfg.pos_embed,
            "init_values": cfg.layer_scale,
        }
    args |= {
        "qkv_bias": cfg.qkv_bias,
        "class_token": cfg.class_token,
        "pos_embed": "learn" if cfg.pos_embed else "none",
        "no_embed_class": bool(cfg.num_prefix_tokens) and not cfg.num_prefix_positions,
        "reg_tokens": cfg.num_registers,
        "pre_norm": cfg.pre_norm,
        "init_values": cfg.layer_scale,
        "fc_norm": cfg.final_norm == "pooled",
        "final_norm": cfg.final_norm != "none",
    }
    # By default timm pools the patches only.
    if cfg.pool == "map" and cfg.num_prefix_tokens:
        args["pool_include_prefix"] = True
    if cfg.activation not in (
        "swiglu",
        get_architecture(choose_architecture(cfg)).facts["activation"],
    ):
        args["act_layer"] = cfg.activation
    return args


def _compute_mlp_ratio(hidden: int, width: int) -> float:
    """Return the mlp_ratio for which timm's int(width * ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def build_table(cfg: ViTConfig) -> Table:
    """Return the names in a file of this model.

    Args:
        cfg: The model's config.

    Returns:
        vitlib's names -> timm's.
    """
    table = dict(_OWN)
    if cfg.rope_theta is not None or cfg.relative_position is not None:
        table |= GAMMAS
        if not cfg.key_bias:
            table = {k: v for k, v in table.items() if k not in QKV} | dict(Q_AND_V)
            table["blocks.{}.attn.k.weight"] = Slice("blocks.{}.attn.qkv.weight", 1, 3)
    if cfg.rope_theta is not None and cfg.activation == "swiglu":
        table |= _GATE
    if cfg.relative_position == "shared":
        table |= SHARED
    if cfg.final_norm == "pooled":
        table |= POOLED_NORM
    return table


def _file_name(name: str, cfg: ViTConfig) -> str:
    """Return a tensor's name in a file of this model; its own where files have none."""
    return rename(name, build_table(cfg))


LAYOUT = Layout(
    name="timm",
    profile="timm",
    find=_find,
    read=_read,
    write=_write,
    file_name=_file_name,
    prepare=_prepare,
    read_image_size=_read_image_size,
    finish=fold_register_positions,
)
