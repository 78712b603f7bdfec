"""The Hugging Face layout: what config.json means, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.layouts import hf_bare
from vitlib.checkpoint.layouts import hf_names as names
from vitlib.checkpoint.layouts.equivalences import (
    add_class_position,
    check_supported,
    convert_head_to_projection,
    drop_key_bias,
)
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.hf_config import (
    ACTIVATION_NAMES,
    activation,
    beit_norm,
    contradicted_parts,
    is_turned,
    naflex_size,
    read_head,
    refuse_head_dim,
    refuse_turned_table,
    special,
    write_config,
)
from vitlib.checkpoint.layouts.hf_families import CLS, FAMILIES
from vitlib.checkpoint.layouts.hf_find import find
from vitlib.checkpoint.layouts.hf_types import describe
from vitlib.checkpoint.layouts.infer import Shape, auxiliary_fields, mismatches
from vitlib.checkpoint.layouts.layout import Json, Layout, ParsedConfig, Serialized, sidecar_size
from vitlib.checkpoint.layouts.table import NameMatch, Table, rename, write_state
from vitlib.config import ViTConfig, to_pair
from vitlib.errors import CheckpointError, ConfigError


def config_family(config: Mapping[str, Any]) -> str:
    """The family that a config.json names. Raises CheckpointError where vitlib reads none such."""
    return describe(config).name


def read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """config.json and the shapes of the tensors found, by our names -> what the model is.

    Raises CheckpointError where the two contradict each other, ConfigError where no ViT is so.
    """
    config = json("config.json")
    if config is None or "model_type" not in config:
        return hf_bare.read(json, shapes, name_match, facts)
    classes = config.get("architectures")
    own = [config["model_type"], *(classes if isinstance(classes, list) else [])]
    if facts.architecture is not None and facts.architecture not in own:
        raise ConfigError(
            f"architecture={facts.architecture!r}: config.json says {config['model_type']!r}: "
            "leave it out"
        )
    return ParsedConfig(read_config(config, shapes, name_match))


def read_config(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], name_match: NameMatch | None = None
) -> ViTConfig:
    """The same, of a config at hand."""
    name, family, flat = describe(config)
    values = {ours: flat.get(key, default) for ours, (key, default) in family.numbers.items()}
    values |= family.fixed
    values["activation"] = activation(flat, family)
    values |= special(family.dialect, flat, values)
    values |= auxiliary_fields(shapes)
    values |= read_head(config, shapes, family)
    if family.dialect == "beit":
        values |= beit_norm(name_match, has_head=bool(values.get("num_classes")))
    if values["pooler_dim"] and flat.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(f"config.json has pooler_act {flat['pooler_act']!r}: not tanh")
    if values["pool"] == "map" and not values["attention_pool"]:
        values["pool"] = "mean"
    if values["projection_dim"] and values["pooler_dim"]:
        values["pool"] = "pooler"  # vision-text-dual-encoder projects the pooler's output
    keys = {ours: key for ours, (key, _) in family.numbers.items()}
    keys |= {"mlp_dim": keys.get("mlp_dim", "mlp_ratio"), "num_classes": "the number of labels"}
    clashes = [(keys.get(ours, ours), *pair) for ours, *pair in mismatches(values, shapes)]
    clashes += contradicted_parts(config, flat, family, shapes, name_match)
    if clashes:
        told = "; ".join(
            f"{key} {_shown(said, held)} (the tensors have {held})" for key, said, held in clashes
        )
        raise CheckpointError(f"config.json contradicts the tensors: {told}")
    cfg = ViTConfig(family=name, **values)
    refuse_turned_table(cfg)
    refuse_head_dim(family, flat, cfg)
    return cfg


def _shown(said: object, held: object) -> str:
    return repr(said) if str(said) == str(held) else str(said)  # "60" is no 60


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """The model as model.safetensors and config.json. Raises ConfigError where no class of
    transformers is such a model."""
    cfg, state = as_family(cfg, state)
    config = write_config(cfg, str(state["norm.weight"].dtype).removeprefix("torch."))
    wide = FAMILIES[cfg.family].head == {**CLS, "pool": "cls+mean"}
    if cfg.num_classes and cfg.pool == "cls" and wide:
        # A head on [CLS] alone is one on [CLS; mean] that gives the mean no weight.
        weight = state["head.weight"]
        state["head.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    table = _table(cfg)
    own = {ours: t for ours, t in state.items() if not ours.startswith(_OUTSIDE)}
    outside = {ours: t for ours, t in state.items() if ours.startswith(_OUTSIDE)}
    prefix = FAMILIES[cfg.family].prefix if outside else ""
    tensors = {prefix + name: t for name, t in write_state(own, table, cfg).items()}
    return Serialized(tensors | write_state(outside, table, cfg), json={"config.json": config})


_OUTSIDE = ("head.", "head_dist.", "projection.")  # of the base model


def _table(cfg: ViTConfig) -> Table:
    """The names in files of exactly this model."""
    table = dict(FAMILIES[cfg.family].names)
    if cfg.activation == "swiglu":
        table |= names.DINOV3_GATED if cfg.family == "dinov3_vit" else names.DINOV2_SWIGLU
    if cfg.relative_position == "shared":
        table |= names.BEIT_SHARED
    if FAMILIES[cfg.family].dialect == "beit" and cfg.final_norm == "pooled":
        table |= names.BEIT_POOLED
    return {**table, **(names.TWO_HEADS if cfg.dist_head else names.HEAD), **names.PROJECTION}


def file_name(ours: str, cfg: ViTConfig) -> str:
    """Our name of a tensor -> its name in a file of this model; ours where files have none."""
    if cfg.family not in FAMILIES:
        return ours
    name = rename(ours, _table(cfg))
    inside = name != ours and not ours.startswith(_OUTSIDE)
    has_outside = cfg.num_classes or cfg.projection_dim
    return FAMILIES[cfg.family].prefix + name if inside and has_outside else name


def as_family(cfg: ViTConfig, state: dict[str, Tensor]) -> tuple[ViTConfig, dict[str, Tensor]]:
    """The model as one of a family that transformers has, its tensors moved to fit, exactly."""
    state = dict(state)
    if cfg.family == "clip" and cfg.pool == "cls":
        cfg = convert_head_to_projection(cfg, state) if cfg.num_classes else cfg
        if cfg.final_norm == "tokens":  # [CLS] of normed tokens is the normed [CLS]
            cfg = replace(cfg, final_norm="pooled")
    if cfg.family == "siglip" and not cfg.num_classes and cfg.pool == "mean":
        state = {name: t for name, t in state.items() if not name.startswith("attn_pool.")}
        cfg = replace(cfg, attention_pool=False)  # with one, transformers would pool by it
    if cfg.family == "dinov3_vit" and not cfg.num_classes and cfg.final_norm == "tokens":
        cfg = replace(cfg, pool="cls")  # transformers' pooler_output; told by save as lost
    if cfg.layer_scale is not None and cfg.family in ("vit", "deit3"):  # DINOv2 has gains
        cfg = replace(cfg, family="dinov2_with_registers" if cfg.num_registers else "dinov2")
    if cfg.family in ("vit", "vit_mae") and cfg.pool == "mean" and cfg.final_norm == "pooled":
        cfg = drop_key_bias(replace(cfg, family="beit"), state)  # BEiT pools and norms so
    if cfg.family == "vit_mae" and cfg.num_classes:
        cfg = replace(cfg, family="vit")
    if cfg.family not in FAMILIES:
        raise ConfigError(f"family={cfg.family!r}: Hugging Face files are of {', '.join(FAMILIES)}")
    if cfg.pos_embed and cfg.class_token:
        cfg = add_class_position(cfg, state)
    _refuse(cfg)
    return cfg, state


def _refuse(cfg: ViTConfig) -> None:
    """Raise ConfigError where the family's class in transformers cannot compute what this does."""
    family = FAMILIES[cfg.family]
    wanted: dict[str, tuple[Any, ...]] = {
        "class_token": (True,),
        "dist_token": (False,),
        "key_bias": (True,) if cfg.qkv_bias else (True, False),
        "patch_bias": (True,),
        "pre_norm": (False,),
        "pos_embed": (True,),
        "relative_position": (None,),
        "rope_theta": (None,),
        "layer_scale": (None,),
        "num_registers": (0,),
        "activation": tuple(ACTIVATION_NAMES),
        **{name: (value,) for name, value in family.fixed.items() if name != "position_resize"},
    }
    for name in ("rope_theta", "layer_scale", "num_registers", "pos_embed", "key_bias"):
        if name in family.numbers:
            wanted.pop(name)
    if FAMILIES[cfg.family].dialect == "beit":
        wanted.pop("relative_position")
    if "dinov" in cfg.family:
        wanted.pop("activation")
        wanted["layer_scale"] = (cfg.layer_scale if cfg.layer_scale is not None else "a number",)
    ends = [family.base] if not cfg.num_classes else [family.head] if family.head else []
    pools = {end["pool"]: end["final_norm"] for end in ends}
    if "cls+mean" in pools:
        pools["cls"] = "tokens"
    if FAMILIES[cfg.family].dialect == "beit":
        pools["cls"] = "tokens"
    if cfg.family == "siglip" and not cfg.num_classes:
        pools["mean"] = "tokens"
    wanted["pool"] = tuple(pools)
    wanted["final_norm"] = (pools.get(cfg.pool, "tokens"),)
    if cfg.num_classes or cfg.family != "clip":
        wanted["projection_dim"] = (0,)
    check_supported(cfg, wanted, f"transformers' {family.class_name}")
    if is_turned(cfg):
        h, w = cfg.grid_size
        raise ConfigError(
            f"relative positions of a grid of {h}x{w} patches: transformers exchanges its height "
            "and width, and would give other numbers: save it with layout='timm' (on the command "
            "line --layout timm)"
        )


def read_image_size(json: Json) -> tuple[int, int] | None:
    """Pixels (height, width) of the positions, where config.json or vitlib.json says them."""
    config = json("config.json") or {}
    if "model_type" not in config:
        return sidecar_size(json)
    _, family, flat = describe(config)
    if family.dialect == "siglip2":
        return naflex_size(flat, family)
    key, default = family.numbers["image_size"]
    return to_pair("image_size", flat.get(key, default))


def finish(state: dict[str, Tensor], _: tuple[int, int] | None) -> dict[str, Tensor]:
    """transformers writes a tensor of no registers where a model has none."""
    registers = state.get("patch_embed.reg_token")
    if registers is not None and not registers.numel():
        del state["patch_embed.reg_token"]
    return state


LAYOUT = Layout(
    name="hf",
    profile="hf",
    find=find,
    read=read,
    write=write,
    file_name=file_name,
    read_image_size=read_image_size,
    finish=finish,
)
