"""The layout of CLIP's image towers in open_clip: `visual.`, or timm's in `visual.trunk.`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitlib.checkpoint.families import default_num_heads, get_family, with_profile
from vitlib.checkpoint.layouts import openclip_config, timm, timm_config, timm_models
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
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError, to_pair

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
# Only the archives of OpenAI have these names; their towers have QuickGELU and heads of width 64.
_OPENAI = ("input_resolution", "context_length", "vocab_size")
_FAMILIES = ("clip", "siglip", "vit", "ijepa", "eva02", "perception_encoder")
_HEAD = "visual.head."  # layers that open_clip adds to a tower of timm


def _find(names: Iterable[str]) -> NameMatch:
    """Match names of the image tower, and ignore those of the text tower."""
    names = list(names)
    tower = [name for name in names if name.startswith(_PREFIX)]
    if any(name.startswith(_TRUNK) for name in tower):
        name_match = _find_in_trunk(tower)
    elif tower:
        name_match = match_names(tower, (_OWN,), prefixes=(_PREFIX,))
    else:
        return match_names(names, (_OWN,))
    for name in names:
        if not name.startswith(_PREFIX):
            is_text = name.startswith(_TEXT) or name in (*_TEXT_TENSORS, *_OPENAI)
            (name_match.ignored if is_text else name_match.unexpected).append(name)
    return name_match


def _find_in_trunk(tower: list[str]) -> NameMatch:
    """Match names of a tower of timm, and of the projection that open_clip adds to it."""
    inner = timm.LAYOUT.find(
        [name.removeprefix(_TRUNK) for name in tower if name.startswith(_TRUNK)]
    )
    name_match = NameMatch(
        matches={
            name: [part._replace(file_name=_TRUNK + part.file_name) for part in parts]
            for name, parts in inner.matches.items()
        },
        ignored=[_TRUNK + name for name in inner.ignored],
        unexpected=[_TRUNK + name for name in inner.unexpected],
        repeated=[_TRUNK + name for name in inner.repeated],
    )
    outside = [name for name in tower if not name.startswith(_TRUNK)]
    # vitlib's projection has no bias: with one, the layer is a head.
    module = "head" if f"{_HEAD}proj.bias" in outside else "projection"
    rest = match_names(outside, ({module: f"{_HEAD}proj"},))
    if "head.weight" in name_match.matches and module == "head":
        name_match.repeated += [name for name in outside if name.startswith(f"{_HEAD}proj.")]
    name_match.matches |= rest.matches
    name_match.unexpected += rest.unexpected
    return name_match


def _read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """Parse open_clip_config.json if there is one, and infer the rest from the shapes."""
    model, vision = openclip_config.parse_model_config(json)
    if any(parts[0].file_name.startswith(_TRUNK) for parts in name_match.matches.values()):
        return _read_trunk(json, vision, shapes, name_match, facts)
    if vision.get("timm_model_name"):
        raise CheckpointError(
            f"{openclip_config.FILE} has timm_model_name {vision['timm_model_name']!r}, and the "
            "tensors are a tower of open_clip's own: expected visual.trunk; give the weights of "
            "this config"
        )
    unexpected = [name.removeprefix(_PREFIX) for name in name_match.unexpected]
    if "attn_pool.probe" in unexpected:
        raise CheckpointError(
            "a Perception Encoder in its authors' names: give layout='meta' (on the command line "
            "--source-layout meta)"
        )
    if any(name.startswith("attn_pool.") for name in unexpected):
        raise CheckpointError(
            "a tower with CoCa's attentional pool (attn_pool.query and others), which vitlib does "
            "not compute: expected a pool of the class token or the mean"
        )
    inferred = infer_config(shapes, _read_image_size(json))
    if model:
        inferred |= openclip_config.read_tower(model, vision, inferred)
        _check_architecture(facts, inferred)
        cfg = with_profile(ViTConfig(family="clip", **inferred), "original")
        # The config also gives numerics, which override those of the profile.
        cfg = replace(cfg, activation=inferred["activation"], norm_eps=inferred["norm_eps"])
        return ParsedConfig(cfg, ("position_resize",))
    return _read_bare(inferred, name_match, facts)


def _read_bare(inferred: dict[str, Any], name_match: NameMatch, facts: Facts) -> ParsedConfig:
    """Parse a tower without a config: published towers of its shapes give the open fields."""
    from vitlib.checkpoint.layouts import openclip_models

    published = openclip_models.find_configs(inferred)
    if facts.architecture is not None:
        row = _get_own_row(facts.architecture, inferred)
        published = {facts.architecture: openclip_models.parse_facts(row)}
    is_openai = all(name in name_match.ignored for name in _OPENAI)
    # OpenAI's class has no other activation.
    if is_openai:
        published = {n: f for n, f in published.items() if f["activation"] == "quick_gelu"}
    settled = resolve_facts(published, facts)
    doubtful = (
        [] if settled else ["num_heads"] if is_openai else ["num_heads", "activation", "pool"]
    )
    settled = settled or {
        "num_heads": default_num_heads(inferred["embed_dim"], "clip"),
        "activation": "quick_gelu",
        "pool": "cls" if inferred["pre_norm"] else "mean",
        "final_norm": "tokens" if inferred["pre_norm"] else "pooled",
    }
    cfg = with_profile(ViTConfig(family="clip", **inferred, **settled), "original")
    cfg = replace(cfg, activation=settled["activation"])
    assumed = ["num_heads", "norm_eps", "position_resize"]
    assumed += [] if is_openai else ["activation", "pool"]
    return ParsedConfig(cfg, tuple(assumed), tuple(doubtful))


def _get_own_row(name: str, inferred: Mapping[str, Any]) -> openclip_models.Row:
    """Return the row of a stated config, or raise CheckpointError if its tensors differ."""
    from vitlib.checkpoint.layouts import openclip_models

    row = openclip_models.get_row(name)
    shapes = openclip_models.format_shapes(inferred)
    if row["timm_model_name"] or row["pool"] == openclip_models.ATTENTIONAL:
        raise CheckpointError(
            f"architecture={name!r}: its tower has other tensors than this file; state another one"
        )
    if openclip_models.get_row_shapes(row) != shapes:
        expected = dict(
            zip(openclip_models.SHAPES, openclip_models.get_row_shapes(row), strict=True)
        )
        actual = dict(zip(openclip_models.SHAPES, shapes, strict=True))
        differ = [
            f"{k} {expected[k]} (the tensors have {actual[k]})"
            for k in actual
            if actual[k] != expected[k]
        ]
        raise CheckpointError(f"architecture={name!r} has {', '.join(differ)}: state another one")
    return row


def _check_architecture(facts: Facts, inferred: Mapping[str, Any]) -> None:
    """Raise ConfigError if the stated architecture contradicts the config."""
    from vitlib.checkpoint.layouts import openclip_models

    if facts.architecture is None:
        return
    row = openclip_models.parse_facts(_get_own_row(facts.architecture, inferred))
    clashes = [f"{k} {v!r}, the config {inferred[k]!r}" for k, v in row.items() if inferred[k] != v]
    if clashes:
        raise ConfigError(
            f"architecture={facts.architecture!r} has {', '.join(clashes)}: leave architecture out"
        )


def _read_trunk(
    json: Json,
    vision: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    name_match: NameMatch,
    facts: Facts,
) -> ParsedConfig:
    """Parse a tower of timm by its name in the config, or by the stated architecture."""
    from vitlib.checkpoint.layouts import openclip_models

    name, pool = vision.get("timm_model_name"), vision.get("timm_pool", "avg")
    projection = vision.get("timm_proj", "linear")
    if not vision and facts.architecture is not None:
        row = openclip_models.load_rows().get(facts.architecture)
        name, pool, projection = facts.architecture, "", "linear"
        if row is not None:
            name, pool, projection = (row[k] for k in ("timm_model_name", "timm_pool", "timm_proj"))
    if projection == "mlp" or any(n.startswith(f"{_HEAD}mlp.") for n in name_match.unexpected):
        raise CheckpointError(
            f"a tower with open_clip's projection {_HEAD}mlp, which vitlib lacks: expected "
            f"{_HEAD}proj or no projection"
        )
    if pool in ("abs_attn", "rot_attn") or (
        pool == "" and projection in (None, "", "none") and name
    ):
        raise CheckpointError(
            f"{openclip_config.FILE} has timm_pool {pool!r}, without a pooled vector: expected "
            "token, avg or map"
        )
    args = (
        {"global_pool": pool} if pool and name else {}
    )  # without a pool, the architecture's is used
    trunk = {"architecture": name, "model_args": args} if name else {}
    facts = replace(facts, architecture=None)
    return timm_config.read_tower(trunk, shapes, name_match, "timm", facts, _read_image_size(json))


def _read_image_size(json: Json) -> tuple[int, int] | None:
    """Return pixels (height, width) of the positions that the JSON files give, or None."""
    config = (json("open_clip_config.json") or {}).get("model_cfg") or {}
    vision = config.get("vision_cfg") if isinstance(config, dict) else None
    size = vision.get("image_size") if isinstance(vision, dict) else None
    return to_pair("image_size", size) if size else sidecar_size(json)


def _write(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write open_clip_model.safetensors: visual.*, or visual.trunk.* for a tower of timm."""
    state = dict(state)
    if cfg.num_classes:
        cfg = convert_head_to_projection(cfg, state)
    if not _is_own(cfg) or cfg.num_classes:
        return _write_trunk(cfg, state)
    supported: dict[str, tuple[Any, ...]] = {
        "in_channels": (3,),
        "num_classes": (0,),
        "patch_bias": (False,),
        "class_token": (True,),
        "dist_token": (False,),
        "num_registers": (0,),
        "pos_embed": (True,),
        "relative_position": (None,),
        "qkv_bias": (True,),
        "key_bias": (True,),
        "pool": ("cls", "mean"),
        "final_norm": ("tokens", "pooled"),
        "activation": ("gelu", "quick_gelu", "gelu_tanh"),
        "projection_dim": (cfg.outputs.projection_dim or "a projection",),
    }
    check_supported(cfg, supported, "open_clip's image tower")
    cfg = add_class_position(cfg, state)
    tensors = {_PREFIX + name: t for name, t in write_state(state, _OWN, cfg).items()}
    return _serialize(tensors, openclip_config.write_tower(cfg))


def _is_own(cfg: ViTConfig) -> bool:
    """Return True if the tower is written as open_clip's own, False for one of timm."""
    if cfg.rope is not None:
        return False
    return cfg.pre_norm or (cfg.family == "clip" and not cfg.biases.patch)


def _write_trunk(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write a tower of timm, and the projection that open_clip adds to it."""
    if cfg.labels or cfg.outputs.dist_head:
        raise ConfigError(
            "open_clip's towers are no classifiers: expected a model without labels; load with "
            "num_classes=0"
        )
    # A model without a class token is of the family ijepa.
    if cfg.family not in _FAMILIES:
        raise ConfigError(
            f"family={cfg.family!r}: expected one of {', '.join(_FAMILIES)}, the towers of "
            "open_clip; choose another layout"
        )
    timm_parts = {name: (getattr(cfg, name),) for name in ("norms", "proj_bias", "rope")}
    check_supported(cfg, {"in_channels": (3,), **timm_parts}, "open_clip's image tower")
    width, has_bias = cfg.outputs.projection_dim or cfg.num_classes, bool(cfg.num_classes)
    projection = {
        f"{_HEAD}proj.{name.rpartition('.')[2]}": state.pop(name)
        for name in [name for name in state if name.startswith(("projection.", "head."))]
    }
    from vitlib.checkpoint.layouts import timm_write

    bare = replace(cfg, num_classes=0, outputs=replace(cfg.outputs, projection_dim=0))
    cfg, state = timm_write.convert_to_timm(bare, state)
    name = _timm_name(cfg)
    inner = write_state(state, timm_write.build_table(cfg), cfg)
    tensors = {_TRUNK + name: t for name, t in inner.items()}
    vision = {
        "image_size": compact_size(cfg.image_size),
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": {"cls": "token", "mean": "avg", "map": "map"}[cfg.pool],
        "timm_proj": "linear" if width else "none",
    }
    vision |= {"timm_proj_bias": True} if has_bias else {}
    return _serialize(
        tensors | projection, {"embed_dim": width or cfg.embed_dim, "vision_cfg": vision}
    )


def _timm_name(cfg: ViTConfig) -> str:
    """Return the model of timm with the tensors of a tower; open_clip builds it by name.

    Of several, the one with the same GELU and eps; save() logs a difference.

    Raises:
        ConfigError: No model of timm has these sizes and parts.
    """
    parts = timm_models.describe_structure(cfg)
    parts["pos_embed_cls"] = cfg.positions.cls or not cfg.tokens.cls
    structure = {"depth": cfg.depth, "image_size": compact_size(cfg.image_size)}
    facts = timm_models.describe_facts(cfg)
    same = ("activation", "norm_eps")
    facts = {name: value for name, value in facts.items() if name not in same}
    is_usual = not get_family(cfg.family).timm_only  # other families have spellings of their own
    fitting = [
        model
        for model in timm_models.match_tensors(parts, spelling=False)
        if not model.reason and "/" not in model.name
        if not (is_usual and model.structure["spelling"])
        if all(model.structure[field] == value for field, value in structure.items())
        if all(model.facts[field] == value for field, value in facts.items())
    ]
    if not fitting:
        sizes = ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size", "image_size", "pool")
        listed = ", ".join(f"{field}={getattr(cfg, field)!r}" for field in sizes)
        raise ConfigError(
            f"open_clip builds a timm tower by its name alone, and no model of timm's has {listed} "
            "and these tensors: save it with layout='timm'"
        )
    equal = {m.name: sum(m.facts[field] == getattr(cfg, field) for field in same) for m in fitting}
    return max(equal, key=lambda name: (equal[name], name.startswith("vit_")))


def _serialize(tensors: dict[str, Tensor], model: dict[str, Any]) -> Serialized:
    """Return the files of a tower: its tensors and open_clip_config.json."""
    config = {openclip_config.FILE: {"model_cfg": model, "preprocess_cfg": {}}}
    return Serialized(tensors, weights="open_clip_model.safetensors", json=config)


def _file_name(name: str, cfg: ViTConfig) -> str:
    """Return a tensor's name in a file; its own where files have none."""
    if not _is_own(cfg):
        if name.startswith(("projection.", "head.")):
            return f"{_HEAD}proj.{name.rpartition('.')[2]}"
        return _TRUNK + timm.LAYOUT.file_name(name, cfg)
    renamed = rename(name, _OWN)
    return _PREFIX + renamed if renamed != name else name


LAYOUT = Layout(
    name="openclip",
    profile="original",
    find=_find,
    read=_read,
    write=_write,
    file_name=_file_name,
    read_image_size=_read_image_size,
    finish=fold_register_positions,  # for a trunk of timm
    absorb=timm.absorb,
)
