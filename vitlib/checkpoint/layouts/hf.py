"""The Hugging Face layout: config.json and the tensors of transformers' models, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.families import get_family, list_families
from vitlib.checkpoint.families.family import CLS, Config, HfType
from vitlib.checkpoint.layouts.equivalences import (
    add_class_position,
    check_supported,
    split_class_tokens,
)
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.hf_config import (
    ACTIVATION_NAMES,
    fit_pool,
    has_transposed_table,
    list_part_mismatches,
    parse_activation,
    read_head,
    refuse_head_dim,
    refuse_transposed_table,
    write_config,
)
from vitlib.checkpoint.layouts.hf_names import HEAD, PROJECTION, TWO_HEADS, find
from vitlib.checkpoint.layouts.hf_types import find_tower_config
from vitlib.checkpoint.layouts.infer import Shape, auxiliary_fields, mismatches
from vitlib.checkpoint.layouts.layout import Json, Layout, ParsedConfig, Serialized, sidecar_size
from vitlib.checkpoint.layouts.table import NameMatch, Table, rename, write_state
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError, to_pair


def read_family(config: Config) -> str:
    """Read the family that a config.json names.

    Args:
        config: The parsed file.

    Returns:
        `ViTConfig.family`.

    Raises:
        CheckpointError: vitlib does not read the model_type.
    """
    return find_tower_config(config).family


def read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """Read the model from config.json and the shapes of its tensors.

    Args:
        json: The checkpoint's JSON files by name.
        shapes: By vitlib's names.
        name_match: The file's names.
        facts: What the caller states.

    Returns:
        The model.

    Raises:
        CheckpointError: config.json contradicts the tensors, or vitlib does not read it.
        ConfigError: No ViT has such numbers, or a stated architecture is not config.json's.
    """
    config = json("config.json")
    if config is None or "model_type" not in config:
        from vitlib.checkpoint.layouts import hf_bare  # rules for bare files alone

        return hf_bare.read(json, shapes, name_match, facts)
    classes = config.get("architectures")
    own = [config["model_type"], *(classes if isinstance(classes, list) else [])]
    if facts.architecture is not None and facts.architecture not in own:
        raise ConfigError(
            f"architecture={facts.architecture!r}: config.json says {config['model_type']!r}: "
            "leave it out"
        )
    cfg = read_config(config, shapes, name_match)
    # A config.json does not say a pool, and without a head it is the caller's choice.
    free_pool = not (cfg.num_classes or cfg.outputs.projection_dim) and cfg.final_norm == "tokens"
    return ParsedConfig(cfg, ("pool",) if free_pool and facts.pool is not None else ())


def read_config(
    config: Config, shapes: Mapping[str, Shape], name_match: NameMatch | None = None
) -> ViTConfig:
    """Read a config.json with the shapes of the tensors.

    Args:
        config: The parsed file.
        shapes: By vitlib's names.
        name_match: The file's names; None: there is no file.

    Returns:
        The model.

    Raises:
        CheckpointError: The config contradicts the tensors, or vitlib does not read it.
        ConfigError: No ViT has such numbers.
    """
    family, hf_type, tower = find_tower_config(config)
    values = {name: tower.get(key, default) for name, (key, default) in hf_type.numbers.items()}
    values |= hf_type.fixed
    values["activation"] = parse_activation(tower, hf_type)
    values |= hf_type.read_more(tower, values)
    values |= auxiliary_fields(shapes)
    values |= read_head(config, shapes, hf_type)
    values |= hf_type.infer_pooling(name_match, bool(values.get("num_classes")))
    if values["pooler_dim"] and tower.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(f"config.json has pooler_act {tower['pooler_act']!r}: not tanh")
    fit_pool(values)
    # Messages name the keys of config.json, not the fields of ViTConfig.
    keys = {name: key for name, (key, _) in hf_type.numbers.items()}
    keys |= {"mlp_dim": keys.get("mlp_dim", "mlp_ratio"), "num_classes": "the number of labels"}
    clashes = [(keys.get(name, name), *pair) for name, *pair in mismatches(values, shapes)]
    clashes += list_part_mismatches(config, tower, hf_type, shapes, name_match)
    if clashes:
        listed = "; ".join(
            f"{key} {_format(stated, actual)} (the tensors have {actual})"
            for key, stated, actual in clashes
        )
        raise CheckpointError(f"config.json contradicts the tensors: {listed}")
    cfg = ViTConfig(family=family, **values)
    refuse_transposed_table(cfg)
    refuse_head_dim(hf_type, tower, cfg)
    return cfg


def _format(stated: object, actual: object) -> str:
    return repr(stated) if str(stated) == str(actual) else str(stated)  # "60" is not 60


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write a model as model.safetensors and config.json.

    Args:
        cfg: The model.
        state: Tensors by vitlib's names.

    Returns:
        The files.

    Raises:
        ConfigError: No class of transformers is such a model.
    """
    cfg, state = convert_family(cfg, state)
    hf_type = _get_type(cfg)
    config = write_config(cfg, str(state["patch_embed.proj.weight"].dtype).removeprefix("torch."))
    config |= hf_type.write_shapes(cfg, {name: tuple(t.shape) for name, t in state.items()})
    if cfg.num_classes and cfg.pool == "cls" and hf_type.head == {**CLS, "pool": "cls+mean"}:
        # A head on [CLS] alone is one on [CLS; mean] that gives the mean no weight.
        weight = state["head.weight"]
        state["head.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    table = _table(cfg, hf_type)
    # transformers writes heads without the base model's prefix.
    trunk = {name: t for name, t in state.items() if not name.startswith(_OUTSIDE)}
    outside = {name: t for name, t in state.items() if name.startswith(_OUTSIDE)}
    prefix = hf_type.prefix if outside else ""
    tensors = {prefix + name: t for name, t in write_state(trunk, table, cfg).items()}
    return Serialized(tensors | write_state(outside, table, cfg), json={"config.json": config})


_OUTSIDE = ("head.", "head_dist.", "projection.")  # parts that the base model does not have


def _get_type(cfg: ViTConfig) -> HfType:
    """Return how transformers describes the model; raise ConfigError where it has no such."""
    hf_type = get_family(cfg.family).choose_hf(cfg)
    if hf_type is None:
        names = [family.name for family in list_families() if family.hf is not None]
        raise ConfigError(f"family={cfg.family!r}: Hugging Face files are of {', '.join(names)}")
    return hf_type


def _table(cfg: ViTConfig, hf_type: HfType) -> Table:
    """Return the names in files of exactly this model."""
    heads = TWO_HEADS if cfg.outputs.dist_head else HEAD
    return {**hf_type.names, **hf_type.more_names(cfg), **heads, **PROJECTION}


def file_name(name: str, cfg: ViTConfig) -> str:
    """Return the name of a tensor in a file of a model.

    Args:
        name: vitlib's name of the tensor.
        cfg: The model.

    Returns:
        The file's name; vitlib's where files have none.
    """
    hf_type = get_family(cfg.family).choose_hf(cfg)
    if hf_type is None:
        return name
    renamed = rename(name, _table(cfg, hf_type))
    inside = renamed != name and not name.startswith(_OUTSIDE)
    has_outside = cfg.num_classes or cfg.outputs.projection_dim
    return hf_type.prefix + renamed if inside and has_outside else renamed


def convert_family(
    cfg: ViTConfig, state: Mapping[str, Tensor]
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Describe a model as one of a family that transformers has, by the same function.

    Args:
        cfg: The model.
        state: Tensors by vitlib's names.

    Returns:
        The config and the tensors of the other description.

    Raises:
        ConfigError: No class of transformers is such a model.
    """
    state = dict(state)
    cfg = get_family(cfg.family).to_hf(cfg, state)
    hf_type = _get_type(cfg)
    has_class_positions = hf_type.fixed.get("pos_embed_cls", True)
    if cfg.positions.embed and cfg.tokens.cls and has_class_positions:
        cfg = add_class_position(cfg, state)
    _refuse(cfg, hf_type)
    return cfg, state


def _refuse(cfg: ViTConfig, hf_type: HfType) -> None:
    """Raise ConfigError where the family's class in transformers computes another function."""
    allowed: dict[str, tuple[Any, ...]] = {
        "class_token": (True,),
        "dist_token": (False,),
        "key_bias": (True,) if cfg.biases.qkv else (True, False),
        "patch_bias": (True,),
        "pre_norm": (False,),
        "pos_embed": (True,),
        "relative_position": (None,),
        "layer_scale": (None,),
        "num_registers": (0,),
        "activation": tuple(ACTIVATION_NAMES),
        **{name: (value,) for name, value in hf_type.fixed.items() if name != "position_resize"},
    }
    for name in ("layer_scale", "num_registers", "pos_embed", "key_bias"):
        if name in hf_type.numbers:
            allowed.pop(name)
    # The type's own rules come last and replace the usual ones.
    allowed |= hf_type.allowed(cfg)
    end = hf_type.head if cfg.num_classes else hf_type.base
    more = hf_type.head_pools if cfg.num_classes else hf_type.base_pools
    pools = {} if end is None else {end["pool"]: end["final_norm"], **more}
    allowed["pool"] = tuple(pools)
    allowed["final_norm"] = (pools.get(cfg.pool, "tokens"),)
    if cfg.num_classes or not hf_type.projects:
        allowed["projection_dim"] = (0,)
    check_supported(cfg, allowed, f"transformers' {hf_type.class_name}")
    if has_transposed_table(cfg):
        h, w = cfg.grid_size
        raise ConfigError(
            f"relative positions of a grid of {h}x{w} patches: transformers exchanges its height "
            "and width, and would give other numbers: save it with layout='timm' (on the command "
            "line --layout timm)"
        )


def read_image_size(json: Json) -> tuple[int, int] | None:
    """Read the size of images whose positions the file holds.

    Args:
        json: The checkpoint's JSON files by name.

    Returns:
        Pixels (height, width); None where neither config.json nor vitlib.json says them.
    """
    config = json("config.json") or {}
    if "model_type" not in config:
        return sidecar_size(json)
    _, hf_type, tower = find_tower_config(config)
    if hf_type.read_size is not None:
        return hf_type.read_size(tower)
    key, default = hf_type.numbers["image_size"]
    return to_pair("image_size", tower.get(key, default))


def absorb(cfg: ViTConfig, state: dict[str, Tensor], json: Json) -> dict[str, Tensor]:
    """Rewrite tensors of a family's class exactly as vitlib's.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.
        json: The checkpoint's JSON files by name.

    Returns:
        The same dict.
    """
    hf_type = get_family(cfg.family).hf
    if hf_type is not None:
        hf_type.absorb(cfg, state, json("config.json") or {})
    return state


def finish_tokens(state: dict[str, Tensor], _: tuple[int, int] | None) -> dict[str, Tensor]:
    """Drop a tensor of no registers, which transformers writes, and split several class tokens.

    Args:
        state: Tensors by vitlib's names; changed in place.
        _: The image size, which does not matter.

    Returns:
        The same dict.
    """
    registers = state.get("patch_embed.reg_token")
    if registers is not None and not registers.numel():
        del state["patch_embed.reg_token"]
    split_class_tokens(state)
    return state


LAYOUT = Layout(
    name="hf",
    profile="hf",
    find=find,
    read=read,
    write=write,
    file_name=file_name,
    read_image_size=read_image_size,
    finish=finish_tokens,
    absorb=absorb,
)
