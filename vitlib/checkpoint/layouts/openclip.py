"""The image towers of OpenAI's CLIP and open_clip: `visual.`, or timm's in `visual.trunk.`"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitlib.checkpoint.families import guess_num_heads, with_profile
from vitlib.checkpoint.layouts import openclip_config, timm, timm_models
from vitlib.checkpoint.layouts.equivalences import (
    add_class_position,
    check_supported,
    convert_head_to_projection,
    fold_register_positions,
)
from vitlib.checkpoint.layouts.facts import Facts, resolve_facts
from vitlib.checkpoint.layouts.infer import Shape, compact_size, infer_config
from vitlib.checkpoint.layouts.layout import Json, Layout, ParsedConfig, Serialized, sidecar_size
from vitlib.checkpoint.layouts.table import (
    ROWS,
    TRANSPOSED,
    VECTOR,
    NameMatch,
    Slice,
    Table,
    fused_qkv,
    match_names,
    rename,
    write_state,
)
from vitlib.config import ViTConfig, to_pair
from vitlib.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from vitlib.checkpoint.layouts import openclip_models  # a table for bare files alone

_BLOCK = "transformer.resblocks.{}"
_OWN: Table = {
    "patch_embed.cls_token": Slice("class_embedding", reshape=VECTOR),
    "patch_embed.pos_embed": Slice("positional_embedding", reshape=ROWS),
    "patch_embed.proj": "conv1",
    "norm_pre": "ln_pre",
    "blocks.{}.norm1": f"{_BLOCK}.ln_1",
    **fused_qkv("blocks.{}.attn", f"{_BLOCK}.attn.in_proj"),
    "blocks.{}.attn.proj": f"{_BLOCK}.attn.out_proj",
    "blocks.{}.norm2": f"{_BLOCK}.ln_2",
    "blocks.{}.mlp.fc1": f"{_BLOCK}.mlp.c_fc",
    "blocks.{}.mlp.fc2": f"{_BLOCK}.mlp.c_proj",
    "blocks.{}.ls1.gamma": f"{_BLOCK}.ls_1.gamma",
    "blocks.{}.ls2.gamma": f"{_BLOCK}.ls_2.gamma",
    "norm": "ln_post",
    "projection.weight": Slice("proj", reshape=TRANSPOSED),
}
_PREFIX, _TRUNK = "visual.", "visual.trunk."
_TEXT = ("transformer.", "text.", "text_decoder.", "token_embedding.", "ln_final.")
_TEXT_TENSORS = ("positional_embedding", "text_projection", "logit_scale", "logit_bias")
# Only the archives that OpenAI published have these: their tower has QuickGELU and heads of 64.
_OPENAI = ("input_resolution", "context_length", "vocab_size")
_HEAD = "visual.head."  # what open_clip puts after a tower of timm's


def find(names: Iterable[str]) -> NameMatch:
    """Which of a file's tensors are which of ours: those of the image tower, by its prefix."""
    names = list(names)
    tower = [name for name in names if name.startswith(_PREFIX)]
    if any(name.startswith(_TRUNK) for name in tower):
        name_match = _in_trunk(tower)
    elif tower:
        name_match = match_names(tower, (_OWN,), prefixes=(_PREFIX,))
    else:
        return match_names(names, (_OWN,))
    for name in names:
        if not name.startswith(_PREFIX):
            text = name.startswith(_TEXT) or name in (*_TEXT_TENSORS, *_OPENAI)
            (name_match.ignored if text else name_match.unexpected).append(name)
    return name_match


def _in_trunk(tower: list[str]) -> NameMatch:
    inner = timm.find([name.removeprefix(_TRUNK) for name in tower if name.startswith(_TRUNK)])
    name_match = NameMatch(
        matches={
            ours: [found._replace(file_name=_TRUNK + found.file_name) for found in several]
            for ours, several in inner.matches.items()
        },
        ignored=[_TRUNK + name for name in inner.ignored],
        unexpected=[_TRUNK + name for name in inner.unexpected],
        repeated=[_TRUNK + name for name in inner.repeated],
    )
    outside = [name for name in tower if not name.startswith(_TRUNK)]
    # With a bias, the projection is what vitlib calls a head.
    ours = "head" if f"{_HEAD}proj.bias" in outside else "projection"
    rest = match_names(outside, ({ours: f"{_HEAD}proj"},))
    if "head.weight" in name_match.matches and ours == "head":
        name_match.repeated += [name for name in outside if name.startswith(f"{_HEAD}proj.")]
    name_match.matches |= rest.matches
    name_match.unexpected += rest.unexpected
    return name_match


def read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """open_clip_config.json, where there is one, and the shapes -> what the tower is."""
    model, vision = openclip_config.parse_model_config(json)
    if any(found[0].file_name.startswith(_TRUNK) for found in name_match.matches.values()):
        return _read_trunk(json, vision, shapes, name_match, facts)
    if vision.get("timm_model_name"):
        raise CheckpointError(
            f"{openclip_config.FILE} has timm_model_name {vision['timm_model_name']!r}, and the "
            "tensors are a tower of open_clip's own"
        )
    if any(name.removeprefix(_PREFIX).startswith("attn_pool.") for name in name_match.unexpected):
        raise CheckpointError(
            "a tower with CoCa's attentional pool (attn_pool.query and others), which vitlib does "
            "not compute"
        )
    held = infer_config(shapes, read_image_size(json))
    if model:
        held |= openclip_config.read_tower(model, vision, held)
        _refuse_another(facts, held)
        cfg = replace(with_profile(ViTConfig(family="clip", **held), "original"), **_numerics(held))
        return ParsedConfig(cfg, ("position_resize",))
    return _read_bare(held, name_match, facts)


def _read_bare(held: dict[str, Any], name_match: NameMatch, facts: Facts) -> ParsedConfig:
    """Settle what no config says of a tower of open_clip's own, or of OpenAI's."""
    from vitlib.checkpoint.layouts import openclip_models

    published = openclip_models.find_configs(held)
    if facts.architecture is not None:
        row = _own_row(facts.architecture, held)
        published = {facts.architecture: openclip_models.parse_facts(row)}
    openai = all(name in name_match.ignored for name in _OPENAI)
    if openai:  # the class that wrote these has no other
        published = {n: f for n, f in published.items() if f["activation"] == "quick_gelu"}
    settled = resolve_facts(published, facts)
    doubtful = [] if settled else ["num_heads"] if openai else ["num_heads", "activation", "pool"]
    settled = settled or {
        "num_heads": guess_num_heads(held["embed_dim"], "clip"),
        "activation": "quick_gelu",
        "pool": "cls" if held["pre_norm"] else "mean",
        "final_norm": "tokens" if held["pre_norm"] else "pooled",
    }
    cfg = with_profile(ViTConfig(family="clip", **held, **settled), "original")
    cfg = replace(cfg, activation=settled["activation"])
    assumed = ["num_heads", "norm_eps", "position_resize"]
    assumed += [] if openai else ["activation", "pool"]
    return ParsedConfig(cfg, tuple(assumed), tuple(doubtful))


def _own_row(name: str, held: Mapping[str, Any]) -> openclip_models.Row:
    """Return the row of a stated config. Raises CheckpointError where the tensors are not its."""
    from vitlib.checkpoint.layouts import openclip_models

    row = openclip_models.get_row(name)
    shapes = openclip_models.format_shapes(held)
    if row["timm_model_name"] or row["pool"] == openclip_models.ATTENTIONAL:
        raise CheckpointError(f"architecture={name!r}: its tower has other tensors than this file")
    if openclip_models.get_row_shapes(row) != shapes:
        wanted = dict(zip(openclip_models.SHAPES, openclip_models.get_row_shapes(row), strict=True))
        got = dict(zip(openclip_models.SHAPES, shapes, strict=True))
        differ = [
            f"{k} {wanted[k]} (the tensors have {got[k]})" for k in got if got[k] != wanted[k]
        ]
        raise CheckpointError(f"architecture={name!r} has {', '.join(differ)}")
    return row


def _refuse_another(facts: Facts, held: Mapping[str, Any]) -> None:
    """Raise ConfigError where the stated architecture is not what the config says."""
    from vitlib.checkpoint.layouts import openclip_models

    if facts.architecture is None:
        return
    row = openclip_models.parse_facts(_own_row(facts.architecture, held))
    clashes = [f"{k} {v!r}, the config {held[k]!r}" for k, v in row.items() if held[k] != v]
    if clashes:
        raise ConfigError(f"architecture={facts.architecture!r} has {', '.join(clashes)}")


def _numerics(held: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of numbers that a profile also has."""
    return {name: held[name] for name in ("activation", "norm_eps")}


def _read_trunk(
    json: Json,
    vision: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    name_match: NameMatch,
    facts: Facts,
) -> ParsedConfig:
    """Read a tower of timm's by its name in the config, or the one stated."""
    from vitlib.checkpoint.layouts import openclip_models

    name, pool = vision.get("timm_model_name"), vision.get("timm_pool", "avg")
    projection = vision.get("timm_proj", "linear")
    if not vision and facts.architecture is not None:
        row = openclip_models.load_rows().get(facts.architecture)
        name, pool, projection = facts.architecture, "", "linear"
        if row is not None:
            name, pool, projection = (row[k] for k in ("timm_model_name", "timm_pool", "timm_proj"))
    if projection == "mlp" or any(n.startswith(f"{_HEAD}mlp.") for n in name_match.unexpected):
        raise CheckpointError(f"a tower with open_clip's projection {_HEAD}mlp, which vitlib lacks")
    if pool in ("abs_attn", "rot_attn") or (
        pool == "" and projection in (None, "", "none") and name
    ):
        raise CheckpointError(f"{openclip_config.FILE} has timm_pool {pool!r}: no pooled vector")
    args = {"global_pool": pool} if pool and name else {}  # without one, the model keeps its own
    trunk = {"architecture": name, "model_args": args} if name else {}
    facts = replace(facts, architecture=None)
    return timm.read_tower(trunk, shapes, name_match, "timm", facts, read_image_size(json))


def read_image_size(json: Json) -> tuple[int, int] | None:
    """Pixels (height, width) of the positions, where open_clip_config.json or vitlib.json says."""
    config = (json("open_clip_config.json") or {}).get("model_cfg") or {}
    vision = config.get("vision_cfg") if isinstance(config, dict) else None
    size = vision.get("image_size") if isinstance(vision, dict) else None
    return to_pair("image_size", size) if size else sidecar_size(json)


def get_timm_name(json: Json) -> object:
    """Return the name of timm's model that open_clip_config.json gives its tower, or None."""
    return openclip_config.parse_model_config(json)[1].get("timm_model_name")


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """The tower as open_clip_model.safetensors: visual.*, or visual.trunk.* for timm's."""
    state = dict(state)
    if cfg.num_classes:
        cfg = convert_head_to_projection(cfg, state)
    if not _is_own(cfg) or cfg.num_classes:
        return _write_trunk(cfg, state)
    wanted: dict[str, tuple[Any, ...]] = {
        "in_channels": (3,),
        "num_classes": (0,),
        "patch_bias": (False,),
        "class_token": (True,),
        "dist_token": (False,),
        "num_registers": (0,),
        "pos_embed": (True,),
        "rope_theta": (None,),
        "relative_position": (None,),
        "qkv_bias": (True,),
        "key_bias": (True,),
        "pool": ("cls", "mean"),
        "final_norm": ("tokens", "pooled"),
        "activation": ("gelu", "quick_gelu", "gelu_tanh"),
        "projection_dim": (cfg.projection_dim or "a projection",),
    }
    check_supported(cfg, wanted, "open_clip's image tower")
    cfg = add_class_position(cfg, state)
    tensors = {_PREFIX + name: t for name, t in write_state(state, _OWN, cfg).items()}
    return _written(tensors, openclip_config.write_tower(cfg))


def _is_own(cfg: ViTConfig) -> bool:
    """Return whether the tower is written as open_clip's own and not as one of timm's."""
    return cfg.pre_norm or (cfg.family == "clip" and not cfg.patch_bias)


def _write_trunk(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """timm's tower, and open_clip's projection after it where there is one."""
    if cfg.labels or cfg.dist_head:
        raise ConfigError("open_clip's towers are no classifiers: load with num_classes=0")
    if cfg.family not in ("siglip", "vit", "clip", "ijepa"):  # ijepa: any without a class token
        raise ConfigError(f"family={cfg.family!r}: open_clip's towers are CLIP, SigLIP and ViT")
    check_supported(cfg, {"in_channels": (3,)}, "open_clip's image tower")
    width, biased = cfg.projection_dim or cfg.num_classes, bool(cfg.num_classes)
    projection = {
        f"{_HEAD}proj.{name.rpartition('.')[2]}": state.pop(name)
        for name in [name for name in state if name.startswith(("projection.", "head."))]
    }
    cfg, state = timm.convert_to_timm(replace(cfg, projection_dim=0, num_classes=0), state)
    name = _timm_name(cfg)
    inner = write_state(state, timm.build_table(cfg), cfg)
    tensors = {_TRUNK + name: t for name, t in inner.items()}
    vision = {
        "image_size": compact_size(cfg.image_size),
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": {"cls": "token", "mean": "avg", "map": "map"}[cfg.pool],
        "timm_proj": "linear" if width else "none",
    }
    vision |= {"timm_proj_bias": True} if biased else {}
    return _written(
        tensors | projection, {"embed_dim": width or cfg.embed_dim, "vision_cfg": vision}
    )


def _timm_name(cfg: ViTConfig) -> str:
    """Return the model of timm's that open_clip builds for a tower, which takes a name alone.

    Where several have its tensors, the one with its GELU and eps; save() tells where none has.

    Raises:
        ConfigError: No model of timm's is so large, or has these parts.
    """
    parts = {name: getattr(cfg, name) for name in timm_models.STRUCTURE if hasattr(cfg, name)}
    parts |= {
        "pos_embed_cls": cfg.pos_embed_cls or not cfg.class_token,
        "layer_scale": cfg.layer_scale is not None,
        "gated": cfg.activation == "swiglu",
        "patch_size": cfg.patch_size,
        "depth": cfg.depth,
    }
    wanted = {"depth": cfg.depth, "image_size": compact_size(cfg.image_size)}
    facts = {"num_heads": cfg.num_heads, "pool": cfg.pool, "rope_theta": None}
    fitting = [
        model
        for model in timm_models.match_tensors(parts)
        if not model.reason and "/" not in model.name
        if all(model.structure[field] == value for field, value in wanted.items())
        if all(model.facts[field] == value for field, value in facts.items())
    ]
    if not fitting:
        sizes = ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size", "image_size", "pool")
        told = ", ".join(f"{field}={getattr(cfg, field)!r}" for field in sizes)
        raise ConfigError(
            f"open_clip builds a timm tower by its name alone, and no model of timm's has {told} "
            "and these tensors: save it with layout='timm'"
        )
    same = ("activation", "norm_eps")
    equal = {m.name: sum(m.facts[field] == getattr(cfg, field) for field in same) for m in fitting}
    return max(equal, key=lambda name: (equal[name], name.startswith("vit_")))


def _written(tensors: dict[str, Tensor], model: dict[str, Any]) -> Serialized:
    config = {openclip_config.FILE: {"model_cfg": model, "preprocess_cfg": {}}}
    return Serialized(tensors, weights="open_clip_model.safetensors", json=config)


def file_name(ours: str, cfg: ViTConfig) -> str:
    """Our name of a tensor -> its name in a file; ours where files have none."""
    if not _is_own(cfg):
        own = ours.startswith(("projection.", "head."))
        return (
            f"{_HEAD}proj.{ours.rpartition('.')[2]}" if own else _TRUNK + timm.file_name(ours, cfg)
        )
    name = rename(ours, _OWN)
    return _PREFIX + name if name != ours else ours


LAYOUT = Layout(
    name="openclip",
    profile="original",
    find=find,
    read=read,
    write=write,
    file_name=file_name,
    read_image_size=read_image_size,
    finish=fold_register_positions,  # of a trunk that is timm's
)
