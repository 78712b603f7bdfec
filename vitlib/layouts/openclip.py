"""The image towers of OpenAI's CLIP and open_clip: `visual.`, or timm's in `visual.trunk.`"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vitlib.config import ViTConfig, as_pair
from vitlib.errors import CheckpointError, ConfigError
from vitlib.layouts import timm
from vitlib.layouts.facts import Facts
from vitlib.layouts.families import as_profile, num_heads
from vitlib.layouts.held import Shape, structure
from vitlib.layouts.layout import Json, Layout, Reading, Written, size_beside
from vitlib.layouts.moves import (
    head_as_projection,
    refuse,
    with_class_position,
    without_register_positions,
)
from vitlib.layouts.table import (
    ROWS,
    TRANSPOSED,
    VECTOR,
    Located,
    Piece,
    Table,
    fused_qkv,
    locate,
    rename,
    write_state,
)

_BLOCK = "transformer.resblocks.{}"
_OWN: Table = {
    "patch_embed.cls_token": Piece("class_embedding", form=VECTOR),
    "patch_embed.pos_embed": Piece("positional_embedding", form=ROWS),
    "patch_embed.proj": "conv1",
    "pre_norm": "ln_pre",
    "blocks.{}.norm1": f"{_BLOCK}.ln_1",
    **fused_qkv("blocks.{}.attn", f"{_BLOCK}.attn.in_proj"),
    "blocks.{}.attn.out": f"{_BLOCK}.attn.out_proj",
    "blocks.{}.norm2": f"{_BLOCK}.ln_2",
    "blocks.{}.mlp.fc1": f"{_BLOCK}.mlp.c_fc",
    "blocks.{}.mlp.fc2": f"{_BLOCK}.mlp.c_proj",
    "blocks.{}.scale1": f"{_BLOCK}.ls_1.gamma",
    "blocks.{}.scale2": f"{_BLOCK}.ls_2.gamma",
    "norm": "ln_post",
    "projection.weight": Piece("proj", form=TRANSPOSED),
}
_PREFIX, _TRUNK = "visual.", "visual.trunk."
_TEXT = (
    "transformer.",
    "text.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "logit_scale",
    "logit_bias",
    "input_resolution",
    "context_length",
    "vocab_size",
)


def find(names: Iterable[str]) -> Located:
    """Which of a file's tensors are which of ours: those of the image tower, by its prefix."""
    names = list(names)
    tower = [name for name in names if name.startswith(_PREFIX)]
    if any(name.startswith(_TRUNK) for name in tower):
        located = _in_trunk(tower)
    elif tower:
        located = locate(tower, (_OWN,), prefixes=(_PREFIX,))
    else:
        return locate(names, (_OWN,))
    for name in names:
        if not name.startswith(_PREFIX):
            (located.ignored if name.startswith(_TEXT) else located.unexpected).append(name)
    return located


def _in_trunk(tower: list[str]) -> Located:
    inner = timm.find([name.removeprefix(_TRUNK) for name in tower if name.startswith(_TRUNK)])
    located = Located(
        ours={
            ours: [found._replace(theirs=_TRUNK + found.theirs) for found in several]
            for ours, several in inner.ours.items()
        },
        ignored=[_TRUNK + name for name in inner.ignored],
        unexpected=[_TRUNK + name for name in inner.unexpected],
        repeated=[_TRUNK + name for name in inner.repeated],
    )
    outside = [name for name in tower if not name.startswith(_TRUNK)]
    rest = locate(outside, ({"projection": "visual.head.proj"},))
    located.ours |= rest.ours
    located.unexpected += rest.unexpected
    return located


def read(json: Json, shapes: Mapping[str, Shape], located: Located, facts: Facts) -> Reading:
    """open_clip_config.json, where there is one, and the shapes -> what the tower is."""
    config = (json("open_clip_config.json") or {}).get("model_cfg") or {}
    vision = config.get("vision_cfg") or {}
    if not isinstance(vision, dict):
        raise CheckpointError("open_clip_config.json: expected vision_cfg to be an object")
    size = size_of(json)
    if any(found[0].theirs.startswith(_TRUNK) for found in located.ours.values()):
        name = vision.get("timm_model_name")
        args = {"global_pool": vision["timm_pool"]} if "timm_pool" in vision else {}
        trunk = {"architecture": name, "model_args": args} if isinstance(name, str) else {}
        return timm.read_tower(trunk, shapes, located, "timm", facts, size)
    held = structure(shapes, size)
    held |= {"pool": "cls", "final_norm": "tokens"}
    if vision.get("pool_type", "tok") != "tok" or vision.get("attentional_pool"):
        raise CheckpointError("open_clip_config.json: a tower that does not pool its class token")
    width = vision.get("head_width")
    heads = held["embed_dim"] // width if isinstance(width, int) and width else None
    assumed = [] if config else ["num_heads", "activation", "norm_eps"]
    held["num_heads"] = heads or num_heads(held["embed_dim"], "clip")
    cfg = as_profile(ViTConfig(family="clip", **held), "original")
    quick = bool(config.get("quick_gelu", False)) if config else True  # OpenAI's are quick
    cfg = replace(cfg, activation="quick_gelu" if quick else "gelu")
    doubtful = tuple(name for name in assumed if name == "num_heads")
    return Reading(cfg, (*assumed, "position_resize"), doubtful)


def size_of(json: Json) -> tuple[int, int] | None:
    """Pixels (height, width) of the positions, where open_clip_config.json or vitlib.json says."""
    config = (json("open_clip_config.json") or {}).get("model_cfg") or {}
    vision = config.get("vision_cfg") if isinstance(config, dict) else None
    size = vision.get("image_size") if isinstance(vision, dict) else None
    return as_pair("image_size", size) if size else size_beside(json)


def write(cfg: ViTConfig, state: dict[str, Tensor]) -> Written:
    """The tower as open_clip_model.safetensors: visual.*, or visual.trunk.* for SigLIP."""
    state = dict(state)
    if not cfg.pre_norm:
        return _write_trunk(cfg, state)
    if cfg.num_classes:
        cfg = head_as_projection(cfg, state)
    wanted: dict[str, tuple[Any, ...]] = {
        "num_classes": (0,),
        "pre_norm": (True,),
        "patch_bias": (False,),
        "class_token": (True,),
        "dist_token": (False,),
        "num_registers": (0,),
        "absolute_position": (True,),
        "qkv_bias": (True,),
        "key_bias": (True,),
        "pool": ("cls",),
        "final_norm": ("tokens", "pooled"),
        "activation": ("gelu", "quick_gelu"),
        "projection_dim": (cfg.projection_dim or "a projection",),
    }
    refuse(cfg, wanted, "open_clip's image tower")
    cfg = with_class_position(cfg, state)
    tensors = {_PREFIX + name: t for name, t in write_state(state, _OWN, cfg).items()}
    vision = {
        "image_size": cfg.image_size[0] if len(set(cfg.image_size)) == 1 else list(cfg.image_size),
        "layers": cfg.depth,
        "width": cfg.embed_dim,
        "head_width": cfg.head_dim,
        "patch_size": cfg.patch_size[0] if len(set(cfg.patch_size)) == 1 else list(cfg.patch_size),
        "mlp_ratio": cfg.mlp_dim / cfg.embed_dim,
    }
    model = {"embed_dim": cfg.projection_dim, "vision_cfg": vision}
    model |= {"quick_gelu": True} if cfg.activation == "quick_gelu" else {}
    return _written(tensors, model)


def _write_trunk(cfg: ViTConfig, state: dict[str, Tensor]) -> Written:
    """timm's tower, and open_clip's projection after it where there is one."""
    if cfg.num_classes:
        raise ConfigError("open_clip's timm towers have no classifier: save with num_classes=0")
    if cfg.family not in ("siglip", "vit"):
        raise ConfigError(f"family={cfg.family!r}: open_clip's towers are CLIP, SigLIP and ViT")
    width = cfg.projection_dim
    projection = {"visual.head.proj.weight": state.pop("projection.weight")} if width else {}
    cfg, state = timm.as_timm(replace(cfg, projection_dim=0), state)
    inner = write_state(state, timm.names_of(cfg), cfg)
    tensors = {_TRUNK + name: t for name, t in inner.items()}
    vision = {
        "image_size": cfg.image_size[0] if len(set(cfg.image_size)) == 1 else list(cfg.image_size),
        "timm_model_name": timm.architecture(cfg),
        "timm_model_pretrained": False,
        "timm_pool": {"cls": "token", "mean": "avg", "map": "map"}[cfg.pool],
        "timm_proj": "linear" if width else "none",
    }
    return _written(
        tensors | projection, {"embed_dim": width or cfg.embed_dim, "vision_cfg": vision}
    )


def _written(tensors: dict[str, Tensor], model: dict[str, Any]) -> Written:
    config = {"open_clip_config.json": {"model_cfg": model, "preprocess_cfg": {}}}
    return Written(tensors, weights="open_clip_model.safetensors", json=config)


def name_of(ours: str, cfg: ViTConfig) -> str:
    """Our name of a tensor -> its name in a file; ours where files have none."""
    if not cfg.pre_norm:
        own = ours.startswith("projection.")
        return "visual.head.proj.weight" if own else _TRUNK + timm.name_of(ours, cfg)
    name = rename(ours, _OWN)
    return _PREFIX + name if name != ours else ours


LAYOUT = Layout(
    name="openclip",
    profile="original",
    find=find,
    read=read,
    write=write,
    name_of=name_of,
    size_of=size_of,
    finish=without_register_positions,  # of a trunk that is timm's
)
