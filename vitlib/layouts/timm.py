"""The timm layout: names, and what its config.json means. Most original code names so too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitlib.config import Activation, ViTConfig, as_pair
from vitlib.errors import CheckpointError
from vitlib.layouts import timm_names as names
from vitlib.layouts.facts import Facts
from vitlib.layouts.families import as_profile, num_heads, numbers
from vitlib.layouts.held import Shape, structure
from vitlib.layouts.layout import Json, Layout, Reading, Written, size_beside
from vitlib.layouts.moves import (
    projection_as_head,
    refuse,
    with_key_bias,
    without_class_position,
    without_register_positions,
)
from vitlib.layouts.table import Located, Piece, Table, locate, rename, write_state

# What the name of a model says that its tensors may not: of its family, and of its GELU.
_FAMILY_WORDS = (
    ("dinov3", "dinov3_vit"),
    ("siglip", "siglip"),
    ("clip", "clip"),
    ("beit", "beit"),
    ("deit3", "deit3"),
    ("ijepa", "ijepa"),
    ("mae", "vit_mae"),
    ("distilled", "deit"),
)
_TANH = ("siglip_256", "so400m_patch16", "siglip_512", "giantopt")
_POOLS = {"token": "cls", "avg": "mean", "map": "map", "": "cls"}
_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu": "gelu",
}


def find(theirs: Iterable[str]) -> Located:
    """Which of a file's tensors are which of ours."""
    return locate(theirs, names.READ, prefixes=names.PREFIXES, ignored=names.IGNORED)


def read(json: Json, shapes: Mapping[str, Shape], located: Located, facts: Facts) -> Reading:
    """timm's config.json, where there is one, and the shapes -> what the model is."""
    config = json("config.json") or {}
    name = config.get("architecture")
    named = config if isinstance(name, str) else {}
    return read_tower(named, shapes, located, "timm", facts, size_of(json))


def size_of(json: Json) -> tuple[int, int] | None:
    """Pixels (height, width) of the positions, where config.json or vitlib.json says them."""
    config = json("config.json") or {}
    if isinstance(config.get("architecture"), str):
        args, defaults = (_dict(config, key) for key in ("model_args", "pretrained_cfg"))
        size = args.get("img_size") or (defaults.get("input_size") or (None, None, None))[1:]
        if size and None not in _several(size):
            return as_pair("img_size", size)
    return size_beside(json)


def read_tower(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    located: Located,
    profile: str,
    facts: Facts,
    image_size: tuple[int, int] | None,
) -> Reading:
    """The same of a config at hand: architecture, model_args, pretrained_cfg."""
    args, defaults = (_dict(config, key) for key in ("model_args", "pretrained_cfg"))
    held = structure(shapes, image_size)
    name = f"{config.get('architecture', '')}.{defaults.get('tag', '')}"
    family = family_of(held, name)
    assumed = [] if config else ["norm_eps", "activation"]
    heads = args.get("num_heads") or facts.num_heads
    if "num_heads" not in held and heads is None:
        assumed.append("num_heads")
    held.setdefault("num_heads", heads or num_heads(held["embed_dim"], family))
    pool = config.get("global_pool", args.get("global_pool"))
    held |= _pool(held, located, pool)
    held |= read_labels(config, held["num_classes"])
    if family == "dinov3_vit":
        held["rope_theta"] = 100.0
    if not config:
        held.setdefault("activation", numbers(profile, family)["activation"])
    cfg = as_profile(ViTConfig(family=family, **held), profile)
    if cfg.activation != "swiglu":
        cfg = replace(cfg, activation=_activation(cfg, config, args, name))
    doubtful = tuple(name for name in assumed if name == "num_heads")
    return Reading(cfg, (*assumed, "position_resize"), doubtful)


def _dict(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json has {key} {value!r}: expected an object")
    return value


def _several(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, list | tuple) else (size,)


def family_of(held: Mapping[str, Any], name: str = "") -> str:
    """The family that the tensors, and the model's name where there is one, say."""
    said = next((family for word, family in _FAMILY_WORDS if word in name), None)
    if not held["absolute_position"]:
        return "beit" if held["relative_position"] else "dinov3_vit"
    if held["pre_norm"]:
        return "clip"
    if held["attention_pool"] or (said == "siglip" and not held["class_token"]):
        return "siglip"
    if held["layer_scale"] and held["class_token"]:
        if held["num_registers"]:
            return "dinov2_with_registers"
        return "deit3" if not held["class_position"] and "dinov2" not in name else "dinov2"
    if held["dist_token"]:
        return "deit"
    if not held["class_token"]:
        return "vit" if held["num_registers"] else "ijepa"
    return "vit_mae" if said == "vit_mae" else "vit"


def _activation(
    cfg: ViTConfig, config: Mapping[str, Any], args: Mapping[str, Any], name: str
) -> Activation:
    said = args.get("act_layer")
    if isinstance(said, str):
        if said not in _ACTIVATIONS:
            raise CheckpointError(f"config.json has act_layer {said!r}: expected a GELU")
        return _ACTIVATIONS[said]
    if config and "clip" in name and "siglip" not in name:
        return "quick_gelu" if "quickgelu" in name else "gelu"
    tanh = "siglip" in name and any(word in name for word in _TANH)
    return "gelu_tanh" if tanh else cfg.activation


def _pool(held: Mapping[str, Any], located: Located, said: Any) -> dict[str, Any]:
    """What the head reads, and which norm comes before: by the tensors, then by the config."""
    found = located.ours.get("norm.weight")
    pooled = bool(found) and found is not None and found[0].theirs.endswith("fc_norm.weight")
    if said is None:
        said = "map" if held["attention_pool"] else "token" if held["class_token"] else "avg"
        said = "avg" if pooled else said
    if said not in _POOLS:
        raise CheckpointError(f"config.json has global_pool {said!r}: expected token, avg or map")
    return {"pool": _POOLS[said], "final_norm": "pooled" if pooled else "tokens"}


def read_labels(config: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """label_names, where there are as many as the head has classes."""
    labels = config.get("label_names")
    table = config.get("label_descriptions")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return {}
    if isinstance(table, dict):
        labels = [str(table.get(label, label)) for label in labels]
    return {"labels": tuple(labels)} if len(labels) == num_classes else {}


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


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Written:
    """The model as model.safetensors and timm's config.json, for create_model("local-dir:...")."""
    cfg, state = as_timm(cfg, dict(state))
    config = {
        "architecture": architecture(cfg),
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
    return Written(write_state(state, names_of(cfg), cfg), json={"config.json": config})


def as_timm(cfg: ViTConfig, state: dict[str, Tensor]) -> tuple[ViTConfig, dict[str, Tensor]]:
    """The model with its tensors moved to what timm's classes have, exactly."""
    state.pop("patch_embed.mask_token", None)
    cfg = replace(projection_as_head(cfg, state), mask_token=False)
    if cfg.pool != "pooler":
        for name in ("pooler.weight", "pooler.bias"):
            state.pop(name, None)
        cfg = replace(cfg, pooler_dim=0)
    if cfg.pool != "map" and cfg.attention_pool:
        for name in [name for name in state if name.startswith("attn_pool.")]:
            del state[name]
        cfg = replace(cfg, attention_pool=False)
    if cfg.rope_theta is None and cfg.relative_position is None:
        cfg = with_key_bias(cfg, state)
    if cfg.num_registers or cfg.family == "deit3":
        cfg = without_class_position(cfg, state)
    if cfg.final_norm == "pooled" and cfg.pool == "cls" and cfg.relative_position is None:
        cfg = replace(cfg, final_norm="tokens")  # [CLS] normed is one of all tokens normed
    wanted: dict[str, tuple[Any, ...]] = {
        "pool": ("cls", "mean", "map"),
        "final_norm": ("tokens",) if cfg.pool != "mean" else ("tokens", "pooled"),
        "rope_theta": (None, 100.0),
        "projection_dim": (0,),
        "dist_head": (cfg.dist_token,),  # without heads, timm gives the mean of the two tokens
    }
    if cfg.relative_position is None:  # without any positions it would be read as a DINOv3
        wanted["absolute_position"] = (cfg.rope_theta is None,)
    if cfg.rope_theta is not None or cfg.relative_position is not None:
        wanted |= {"activation": ("gelu", "swiglu"), "pre_norm": (False,), "patch_bias": (True,)}
        wanted["dist_token"] = (False,)
    if cfg.rope_theta is not None:
        wanted["class_token"] = (True,)
        wanted["key_bias"] = (not cfg.qkv_bias, False)
    refuse(cfg, wanted, "timm")
    return cfg, state


# SigLIP towers that timm knows by size: open_clip can build them by these names alone.
_SIGLIPS = {
    (768, 16): ("vit_base_patch16_siglip", (224, 256, 384, 512)),
    (1024, 16): ("vit_large_patch16_siglip", (256, 384)),
    (1152, 14): ("vit_so400m_patch14_siglip", (224, 378, 384)),
    (1152, 16): ("vit_so400m_patch16_siglip", (256, 384, 512)),
}


def architecture(cfg: ViTConfig) -> str:
    """A model of timm's with this one's order of operations and numerics."""
    if cfg.family == "siglip":
        name, sizes = _SIGLIPS.get((cfg.embed_dim, cfg.patch_size[0]), ("", ()))
        known = cfg.image_size[0] in sizes
        name = f"{name}_{cfg.image_size[0]}" if known else _ARCHITECTURES["siglip"]
        return name if cfg.pool == "map" else name.replace("siglip", "siglip_gap")
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
    return name


def _model_args(cfg: ViTConfig) -> dict[str, Any]:
    """What timm builds the model with: its names, every size stated."""
    patch = cfg.patch_size[0] if len(set(cfg.patch_size)) == 1 else list(cfg.patch_size)
    ratio = cfg.mlp_dim * (2 if cfg.activation == "swiglu" and cfg.rope_theta is None else 1)
    args: dict[str, Any] = {
        "img_size": list(cfg.image_size),
        "patch_size": patch,
        "in_chans": cfg.in_channels,
        "embed_dim": cfg.embed_dim,
        "depth": cfg.depth,
        "num_heads": cfg.num_heads,
        "mlp_ratio": ratio / cfg.embed_dim,
        "num_classes": cfg.num_classes,
        "global_pool": {"cls": "token", "mean": "avg", "map": "map"}[cfg.pool],
    }
    if cfg.rope_theta is not None:
        return args | {"num_reg_tokens": cfg.num_registers}
    if cfg.relative_position is not None:
        return args | {
            "use_rel_pos_bias": cfg.relative_position == "block",
            "use_shared_rel_pos_bias": cfg.relative_position == "shared",
            "use_abs_pos_emb": cfg.absolute_position,
            "init_values": cfg.layer_scale,
        }
    args |= {
        "qkv_bias": cfg.qkv_bias,
        "class_token": cfg.class_token,
        "no_embed_class": not cfg.class_position,
        "reg_tokens": cfg.num_registers,
        "pre_norm": cfg.pre_norm,
        "init_values": cfg.layer_scale,
        "fc_norm": cfg.final_norm == "pooled",
    }
    if cfg.activation in ("gelu_tanh", "quick_gelu"):
        args["act_layer"] = cfg.activation
    return args


def names_of(cfg: ViTConfig) -> Table:
    """The names in a file of exactly this model."""
    table = dict(names.OWN)
    if cfg.rope_theta is not None or cfg.relative_position is not None:
        table |= names.GAMMAS
        if not cfg.key_bias:
            table = {k: v for k, v in table.items() if k not in names.QKV} | dict(names.Q_AND_V)
            table["blocks.{}.attn.k.weight"] = Piece("blocks.{}.attn.qkv.weight", 1, 3)
    if cfg.rope_theta is not None and cfg.activation == "swiglu":
        table |= names.GATE
    if cfg.relative_position == "shared":
        table |= names.SHARED
    if cfg.final_norm == "pooled":
        table |= names.POOLED_NORM
    return table


def name_of(ours: str, cfg: ViTConfig) -> str:
    """Our name of a tensor -> its name in a file of this model; ours where files have none."""
    return rename(ours, names_of(cfg))


LAYOUT = Layout(
    name="timm",
    profile="timm",
    find=find,
    read=read,
    write=write,
    name_of=name_of,
    size_of=size_of,
    finish=without_register_positions,
)
