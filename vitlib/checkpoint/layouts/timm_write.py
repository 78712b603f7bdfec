"""Write a model as timm's files: its tensors, and the config.json that timm opens.

A family that only timm's names tell (EVA-02, AIMv2 and others) is written as the published
architecture with its features, and the sizes are arguments beside it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitlib.checkpoint.families import get_family
from vitlib.checkpoint.layouts import timm_models
from vitlib.checkpoint.layouts.computed import DINOV3_ROPE
from vitlib.checkpoint.layouts.equivalences import (
    add_key_bias,
    check_supported,
    convert_projection_to_head,
    drop_unit_layer_scale,
    fold_class_position,
    join_rotary_pairs,
    share_key_heads,
)
from vitlib.checkpoint.layouts.layout import Serialized
from vitlib.checkpoint.layouts.table import Table, write_state
from vitlib.checkpoint.layouts.timm_config import infer_family
from vitlib.checkpoint.layouts.timm_models import Architecture
from vitlib.checkpoint.layouts.timm_names import (
    GAMMAS,
    GATE,
    OWN,
    POOLED_NORM,
    Q_AND_V,
    SHARED,
    SPLIT,
    replace_attention,
)
from vitlib.checkpoint.layouts.timm_sizes import compute_mlp_ratio
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms
from vitlib.errors import ConfigError

# Columns of the table that arguments of timm's classes set: a template may have others.
_SIZES = ("embed_dim", "mlp_dim", "num_registers", "pool_mlp_dim", "layer_scale")


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write model.safetensors and config.json, for timm.create_model("local-dir:...").

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names.

    Returns:
        The files.

    Raises:
        ConfigError: timm has no class that computes this model.
    """
    cfg, state = convert_to_timm(cfg, dict(state))
    args = _model_args(cfg)
    if _is_grouped(cfg):
        args["num_kv_heads"] = share_key_heads(cfg, state)
    files = {"config.json": describe_model(cfg, choose_architecture(cfg), args)}
    return Serialized(write_state(state, build_table(cfg), cfg), json=files)


def describe_model(
    cfg: ViTConfig, architecture: str, args: dict[str, Any], first: str = "patch_embed"
) -> dict[str, Any]:
    """Return timm's config.json of a model.

    Args:
        cfg: The model's config, with tensors that timm has.
        architecture: Name of the architecture in timm.
        args: Its model_args.
        first: timm's name of the module that projects patches.

    Returns:
        The content of the file.
    """
    return {
        "architecture": architecture,
        "num_classes": cfg.num_classes,
        "num_features": cfg.embed_dim,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [cfg.in_channels, *cfg.image_size],
            "fixed_input_size": False,
            "num_classes": cfg.num_classes,
            "first_conv": f"{first}.proj",
            "classifier": ["head", "head_dist"] if cfg.outputs.dist_head else "head",
        },
        **({"label_names": list(cfg.labels)} if cfg.labels else {}),
    }


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
    cfg = convert_projection_to_head(cfg, state)
    cfg = replace(cfg, tokens=replace(cfg.tokens, mask=False))
    if cfg.pool != "pooler":
        for name in ("pooler.weight", "pooler.bias"):
            state.pop(name, None)
        cfg = replace(cfg, outputs=replace(cfg.outputs, pooler_dim=0))
    if cfg.pool != "map" and cfg.attention_pool:
        state = {name: t for name, t in state.items() if not name.startswith("attn_pool.")}
        cfg = replace(cfg, attention_pool=None)
    if _needs_template(cfg):
        return _convert_to_template(cfg, state)
    if cfg.rope is None and cfg.positions.relative is None:
        cfg = add_key_bias(cfg, state)
    if cfg.tokens.registers or cfg.family == "deit3":
        cfg = fold_class_position(cfg, state)
    if cfg.final_norm == "pooled" and cfg.pool == "cls" and cfg.positions.relative is None:
        # The norm treats each token alone.
        cfg = replace(cfg, final_norm="tokens")
    supported: dict[str, tuple[Any, ...]] = {
        "pool": ("cls", "mean", "map"),
        "final_norm": ("tokens", "none") if cfg.pool != "mean" else ("tokens", "pooled", "none"),
        "rope": (None, DINOV3_ROPE),
        "projection_dim": (0,),
        "dist_head": (cfg.tokens.dist,),  # without heads, timm returns the mean of two tokens
    }
    if cfg.rope is None and cfg.positions.relative is None:
        supported["patch_bias"] = (not cfg.pre_norm,)
    if cfg.rope is not None or cfg.positions.relative is not None:
        supported |= {"activation": ("gelu", "swiglu"), "pre_norm": (False,), "patch_bias": (True,)}
        supported["dist_token"] = (False,)
    if cfg.rope is not None:
        supported |= {"class_token": (True,), "pos_embed": (False,)}
        supported["key_bias"] = (not cfg.biases.qkv, False)
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
    if _needs_template(cfg):
        return _find_template(cfg).name
    return find_published_name(cfg) or _default_architecture(cfg)


def find_published_name(cfg: ViTConfig) -> str | None:
    """Return timm's name of a model, where depth and image size may differ.

    Args:
        cfg: The model's config.

    Returns:
        The name; None if there is none, and for rotary or relative positions.
    """
    if cfg.rope is not None or cfg.positions.relative is not None:
        return None
    columns = timm_models.describe_structure(cfg)
    facts = timm_models.describe_facts(cfg)
    family = infer_family(columns, _default_architecture(cfg))
    names = [
        model.name
        for model in timm_models.match_tensors(columns | {"spelling": ""})
        if not model.reason and "/" not in model.name
        if model.facts == facts
        if infer_family(columns, model.name) == family
    ]
    size = f"_{cfg.image_size[0]}"
    return min(names, key=lambda name: (not name.endswith(size), len(name)), default=None)


def _default_architecture(cfg: ViTConfig) -> str:
    """Return an architecture of timm for a model whose sizes timm does not publish."""
    name = get_family(cfg.family).timm_architecture
    if cfg.rope is not None:
        name = "vit_small_plus_patch16_dinov3" if cfg.activation == "swiglu" else name
        return name + ("_qkvb" if cfg.biases.qkv else "")
    if cfg.positions.relative is not None:
        return get_family("beit").timm_architecture
    if "beit" in (cfg.family, get_family(cfg.family).hf_twin):  # without relative positions
        return get_family("vit").timm_architecture
    if cfg.pre_norm:
        name = get_family("clip").timm_architecture
        return (
            name.replace("_clip_", "_clip_quickgelu_") if cfg.activation == "quick_gelu" else name
        )
    if cfg.activation == "swiglu":
        reg = "reg4_" if cfg.tokens.registers else ""
        return f"vit_giant_patch14_{reg}dinov2"
    if cfg.family == "siglip" and cfg.pool != "map":
        return name.replace("siglip", "siglip_gap")
    return name


def _model_args(cfg: ViTConfig) -> dict[str, Any]:
    """Return model_args, with every size of the model."""
    patch = cfg.patch_size[0] if len(set(cfg.patch_size)) == 1 else list(cfg.patch_size)
    is_packed = cfg.activation == "swiglu" and cfg.rope is None
    if _needs_template(cfg):
        is_packed &= "gate" not in str(_find_template(cfg).structure["spelling"])
    hidden = cfg.mlp_dim * (2 if is_packed else 1)
    args: dict[str, Any] = {
        "img_size": list(cfg.image_size),
        "patch_size": patch,
        "in_chans": cfg.in_channels,
        "embed_dim": cfg.embed_dim,
        "depth": cfg.depth,
        "num_heads": cfg.num_heads,
        "mlp_ratio": compute_mlp_ratio(hidden, cfg.embed_dim),
        "num_classes": cfg.num_classes,
        "global_pool": {"cls": "token", "mean": "avg", "map": "map"}[cfg.pool],
    }
    if _needs_template(cfg):
        return args | _list_template_args(cfg)
    if cfg.rope is not None:
        aligned = {} if cfg.activation != "swiglu" else {"swiglu_align_to": math.gcd(hidden, 8)}
        return args | {"num_reg_tokens": cfg.tokens.registers} | aligned
    if cfg.positions.relative is not None:
        return args | {
            "use_rel_pos_bias": cfg.positions.relative == "block",
            "use_shared_rel_pos_bias": cfg.positions.relative == "shared",
            "use_abs_pos_emb": cfg.positions.embed,
            "init_values": cfg.layer_scale,
        }
    args |= {
        "qkv_bias": cfg.biases.qkv,
        "class_token": cfg.tokens.cls,
        "pos_embed": "learn" if cfg.positions.embed else "none",
        "no_embed_class": bool(cfg.num_prefix_tokens) and not cfg.num_prefix_positions,
        "reg_tokens": cfg.tokens.registers,
        "pre_norm": cfg.pre_norm,
        "init_values": cfg.layer_scale,
        "fc_norm": cfg.final_norm == "pooled",
        "final_norm": cfg.final_norm != "none",
    }
    # By default timm pools the patches only.
    if cfg.pool == "map" and cfg.num_prefix_tokens:
        args["pool_include_prefix"] = bool(cfg.attention_pool and cfg.attention_pool.prefix_tokens)
    if cfg.activation not in (
        "swiglu",
        timm_models.get_architecture(choose_architecture(cfg)).facts["activation"],
    ):
        args["act_layer"] = cfg.activation
    return args


def build_table(cfg: ViTConfig) -> Table:
    """Return the names in a file of this model.

    Args:
        cfg: The model's config.

    Returns:
        vitlib's names -> timm's.
    """
    table: dict[str, Any] = dict(OWN)
    if _needs_template(cfg):
        return {**table, **_list_spelled_names(cfg)}
    if cfg.rope is not None or cfg.positions.relative is not None:
        table |= GAMMAS
        if not cfg.biases.key:
            table = replace_attention(table, Q_AND_V)
    if cfg.rope is not None and cfg.activation == "swiglu":
        table |= GATE
    if cfg.positions.relative == "shared":
        table |= SHARED
    if cfg.final_norm == "pooled":
        table |= POOLED_NORM
    return table


def _list_spelled_names(cfg: ViTConfig) -> Table:
    """Return the names that timm spells otherwise in the template of a model than in most."""
    try:
        words = str(_find_template(cfg).structure["spelling"] or "").split()
    except ConfigError:
        words = []  # a message about a file names tensors of models that timm cannot hold, too
    table: dict[str, Any] = {}
    for word, names in {"gamma": GAMMAS, "split": SPLIT, "gate": GATE}.items():
        table |= dict(names) if word in words else {}
    if "q_bias" in words:
        table |= replace_attention({}, Q_AND_V)
    return table | (dict(POOLED_NORM) if cfg.final_norm == "pooled" else {})


def _needs_template(cfg: ViTConfig) -> bool:
    """Return True for a model that only some of timm's published architectures compute."""
    is_dinov3 = cfg.rope in (None, DINOV3_ROPE)
    return not (is_dinov3 and cfg.norms == Norms() and cfg.biases.proj)


def _is_grouped(cfg: ViTConfig) -> bool:
    """Return True for a model whose template shares keys and values among heads."""
    return _needs_template(cfg) and cfg.family == "sapiens2"


def _find_template(cfg: ViTConfig) -> Architecture:
    """Return the published architecture with the features of a model and the nearest sizes.

    Raises ConfigError if there is none.
    """
    columns, facts = timm_models.describe_structure(cfg), timm_models.describe_facts(cfg)
    features = [name for name in timm_models.STRUCTURE if name not in _SIZES]
    fixed = ("activation", "norm_eps", "post_norm")
    models = [
        model
        for model in timm_models.list_supported()
        if all((model.structure[name] or 0) == (columns[name] or 0) for name in features)
        if all(model.facts[name] == facts[name] for name in fixed)
        if infer_family(model.structure, model.name, model.facts["rope"]) == cfg.family
    ]
    if not models:
        raise ConfigError(
            f"timm cannot run a model with family={cfg.family!r}, norms={cfg.norms}, "
            f"rope={cfg.rope} and the rest of this config: none of its published architectures has "
            "these; choose another layout"
        )
    sizes = {"embed_dim": cfg.embed_dim, "mlp_dim": cfg.mlp_dim, "depth": cfg.depth}
    sizes["image_size"] = cfg.image_size[0]

    def distance(model: Architecture) -> tuple[Any, ...]:
        differs = (model.structure[name] != size for name, size in sizes.items())
        return (*differs, model.facts["rope"] != cfg.rope, model.facts["pool"] != cfg.pool)

    return min(models, key=distance)


def _list_template_args(cfg: ViTConfig) -> dict[str, Any]:
    """Return the arguments by which a model differs from its template."""
    scale = {"init_values": cfg.layer_scale}
    pooled, tokens = cfg.final_norm == "pooled", cfg.final_norm == "tokens"
    if cfg.rope is None and cfg.family != "eva02":
        args: dict[str, Any] = {"reg_tokens": cfg.tokens.registers, "fc_norm": pooled}
        args["no_embed_class"] = bool(cfg.num_prefix_tokens) and not cfg.num_prefix_positions
        return args | {"final_norm": cfg.final_norm != "none"} | scale
    args = {"num_reg_tokens": cfg.tokens.registers, "use_fc_norm": pooled}
    args |= {"use_post_transformer_norm": tokens} | ({} if cfg.norms.post else scale)
    pooling, rope = cfg.attention_pool, cfg.rope
    if pooling is not None:
        args["attn_pool_num_heads"] = pooling.num_heads or cfg.num_heads
        width = pooling.mlp_dim or cfg.mlp_dim
        args["attn_pool_mlp_ratio"] = compute_mlp_ratio(width, cfg.embed_dim)
    if rope is not None:
        kind = "mixed" if rope.learned else "cat" if rope.coords == "index" else "dinov3"
        grid = None if rope.reference_grid is None else list(rope.reference_grid)
        args |= {"rope_type": kind, "rope_temperature": rope.theta, "ref_feat_shape": grid}
        args |= {"rope_grid_offset": rope.offset, "rope_grid_indexing": rope.axes}
    return args


def _convert_to_template(
    cfg: ViTConfig, state: dict[str, Tensor]
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Rewrite a model exactly with the tensors of its template in timm."""
    rope, template = cfg.rope, _find_template(cfg)
    check_supported(
        cfg,
        {
            "pool": ("cls", "mean", "map"),
            "projection_dim": (0,),
            "dist_head": (False,),
            "norms": (cfg.norms,),
            "proj_bias": (cfg.biases.proj,),
            "rope": (rope and replace(rope, class_token=False, register_theta=None),),
            "norm_eps": (template.facts["norm_eps"],),
        },
        "timm",
    )
    if cfg.family == "sapiens2":
        drop_unit_layer_scale(cfg, state)
    if rope is not None and rope.coords == "index":
        join_rotary_pairs(cfg, state, inverse=True)
    if cfg.final_norm == "none":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    return cfg, state
