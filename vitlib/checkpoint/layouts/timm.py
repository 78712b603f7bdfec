"""The timm layout: names, and what its config.json means. Most original code names so too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitlib.checkpoint.layouts import timm_names as names
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


def find(theirs: Iterable[str]) -> NameMatch:
    """Which of a file's tensors are which of ours."""
    return match_names(theirs, names.READ, prefixes=names.PREFIXES, ignored=names.IGNORED)


def read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """timm's config.json, where there is one, and the shapes -> what the model is."""
    config = json("config.json") or {}
    name = config.get("architecture")
    stated = facts.architecture
    if (
        isinstance(name, str)
        and stated is not None
        and normalize_name(name) != normalize_name(stated)
    ):
        raise ConfigError(
            f"architecture={stated!r}: config.json says {name!r}: leave it out, or give "
            "config=ViTConfig(...)"
        )
    named = config if isinstance(name, str) else {}
    return read_tower(named, shapes, name_match, "timm", facts, read_image_size(json))


def prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors. Raises CheckpointError where one is not what vitlib computes again."""
    check_computed_tensors(tensors)
    return dict(tensors)


def read_image_size(json: Json) -> tuple[int, int] | None:
    """Pixels (height, width) of the positions, where vitlib.json or config.json says them."""
    config = json("config.json") or {}
    size = get_position_size(config) if isinstance(config.get("architecture"), str) else None
    return sidecar_size(json) or size


# family -> a model of timm's that is built so; its sizes are overridden by model_args.
_ARCHITECTURES = {
    "vit": "vit_base_patch16_224",
    "vit_mae": "vit_base_patch16_224",
    "vit_msn": "vit_base_patch16_224",
    "deit": "deit_base_distilled_patch16_224",
    "deit3": "deit3_base_patch16_224",
    "ijepa": "vit_huge_patch14_gap_224",
    "dinov2": "vit_base_patch14_dinov2",
    "dinov2_with_registers": "vit_base_patch14_reg4_dinov2",
    "dinov3_vit": "vit_base_patch16_dinov3",
    "clip": "vit_base_patch16_clip_224",
    "siglip": "vit_base_patch16_siglip_224",
    "beit": "beit_base_patch16_224",
}


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """The model as model.safetensors and timm's config.json, for create_model("local-dir:...")."""
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
    """The model with its tensors moved to what timm's classes have, exactly."""
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
        cfg = replace(cfg, final_norm="tokens")  # [CLS] normed is one of all tokens normed
    wanted: dict[str, tuple[Any, ...]] = {
        "pool": ("cls", "mean", "map"),
        "final_norm": ("tokens", "none") if cfg.pool != "mean" else ("tokens", "pooled", "none"),
        "rope_theta": (None, 100.0),
        "projection_dim": (0,),
        "dist_head": (cfg.dist_token,),  # without heads, timm gives the mean of the two tokens
    }
    if cfg.rope_theta is None and cfg.relative_position is None:
        wanted["patch_bias"] = (not cfg.pre_norm,)
    if cfg.rope_theta is not None or cfg.relative_position is not None:
        wanted |= {"activation": ("gelu", "swiglu"), "pre_norm": (False,), "patch_bias": (True,)}
        wanted["dist_token"] = (False,)
    if cfg.rope_theta is not None:
        wanted |= {"class_token": (True,), "pos_embed": (False,)}
        wanted["key_bias"] = (not cfg.qkv_bias, False)
    check_supported(cfg, wanted, "timm")
    if cfg.final_norm == "none":  # in vitlib's state it stands for what no forward reads
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    return cfg, state


def choose_architecture(cfg: ViTConfig) -> str:
    """Return a name of timm's whose model, with _model_args, has this one's order of operations."""
    return find_published_name(cfg) or _usual(cfg)


def find_published_name(cfg: ViTConfig) -> str | None:
    """Return the name that timm publishes of exactly this model, but for depth and image size.

    None where there is none, and where the model has rotary or relative positions.
    """
    if cfg.rope_theta is not None or cfg.relative_position is not None:
        return None
    columns = {name: getattr(cfg, name) for name in (*STRUCTURE, *SIZES) if name != "gated"}
    columns |= {"layer_scale": cfg.layer_scale is not None, "gated": cfg.activation == "swiglu"}
    family = infer_family(columns, _usual(cfg))
    names = [
        model.name
        for model in match_tensors(columns | {"spelling": ""})
        if not model.reason and "/" not in model.name
        if all(model.facts[name] == getattr(cfg, name) for name in FACTS)
        if infer_family(columns, model.name) == family
    ]
    size = f"_{cfg.image_size[0]}"
    return min(names, key=lambda name: (not name.endswith(size), len(name)), default=None)


def _usual(cfg: ViTConfig) -> str:
    """Return a name of timm's for a model whose sizes are none that timm publishes."""
    name = _ARCHITECTURES.get(cfg.family, "vit_base_patch16_224")
    if cfg.rope_theta is not None:
        name = "vit_small_plus_patch16_dinov3" if cfg.activation == "swiglu" else name
        return name + ("_qkvb" if cfg.qkv_bias else "")
    if cfg.relative_position is not None:
        return _ARCHITECTURES["beit"]
    if cfg.family in ("beit", "data2vec"):  # without offsets: a ViT that pools as BEiT does
        return _ARCHITECTURES["vit"]
    if cfg.pre_norm:
        name = _ARCHITECTURES["clip"]
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
    """What timm builds the model with: its names, every size stated."""
    patch = cfg.patch_size[0] if len(set(cfg.patch_size)) == 1 else list(cfg.patch_size)
    hidden = cfg.mlp_dim * (2 if cfg.activation == "swiglu" and cfg.rope_theta is None else 1)
    args: dict[str, Any] = {
        "img_size": list(cfg.image_size),
        "patch_size": patch,
        "in_chans": cfg.in_channels,
        "embed_dim": cfg.embed_dim,
        "depth": cfg.depth,
        "num_heads": cfg.num_heads,
        "mlp_ratio": _ratio(hidden, cfg.embed_dim),
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
    if cfg.pool == "map" and cfg.num_prefix_tokens:  # timm's reads the patches alone by itself
        args["pool_include_prefix"] = True
    if cfg.activation not in (
        "swiglu",
        get_architecture(choose_architecture(cfg)).facts["activation"],
    ):
        args["act_layer"] = cfg.activation
    return args


def _ratio(hidden: int, width: int) -> float:
    """Return the factor that timm multiplies the width by, so that int() gives `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def build_table(cfg: ViTConfig) -> Table:
    """The names in a file of exactly this model."""
    table = dict(names.OWN)
    if cfg.rope_theta is not None or cfg.relative_position is not None:
        table |= names.GAMMAS
        if not cfg.key_bias:
            table = {k: v for k, v in table.items() if k not in names.QKV} | dict(names.Q_AND_V)
            table["blocks.{}.attn.k.weight"] = Slice("blocks.{}.attn.qkv.weight", 1, 3)
    if cfg.rope_theta is not None and cfg.activation == "swiglu":
        table |= names.GATE
    if cfg.relative_position == "shared":
        table |= names.SHARED
    if cfg.final_norm == "pooled":
        table |= names.POOLED_NORM
    return table


def file_name(ours: str, cfg: ViTConfig) -> str:
    """Our name of a tensor -> its name in a file of this model; ours where files have none."""
    return rename(ours, build_table(cfg))


LAYOUT = Layout(
    name="timm",
    profile="timm",
    find=find,
    read=read,
    write=write,
    file_name=file_name,
    prepare=prepare,
    read_image_size=read_image_size,
    finish=fold_register_positions,
)
