"""MLCD (2407.17331): CLIP's tower with rotary positions; the class token's angles are learned."""

from __future__ import annotations

from typing import Any

from vitlib.checkpoint.families.clip import NAMES as CLIP_NAMES
from vitlib.checkpoint.families.clip import TOWER_NUMBERS
from vitlib.checkpoint.families.family import Config, Family, HfType, Published
from vitlib.checkpoint.families.vit import BICUBIC_POSITIONS
from vitlib.checkpoint.layouts.table import Table
from vitlib.config import ViTConfig
from vitlib.config_parts import Rope
from vitlib.errors import CheckpointError, is_number
from vitlib.image.configs.transform import BICUBIC, CLIP_STATS, crop

_NAMES: Table = {
    **{name: row for name, row in CLIP_NAMES.items() if name != "patch_embed.pos_embed"},
    "attn_position.cls_angles": "class_pos_emb",
}
_BIG_GIANT: dict[str, Any] = {
    "hidden_size": 1664,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
}
_BIG_GIANT |= {"intermediate_size": 8192, "patch_size": 14, "image_size": 336}
_BIG_GIANT |= {"layer_norm_eps": 1e-5}


def _build_rope(theta: float) -> Rope:
    return Rope(theta=theta, coords="index", class_token=True)


def _read_rope(config: Config, _: Config) -> dict[str, Any]:
    """Read the longest period; raise CheckpointError for other angles, and for shared keys."""
    parameters: Any = config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        parameters = {"rope_type": parameters}
    kind, groups = parameters.get("rope_type", "axial"), config.get("num_key_value_groups", 1)
    theta: Any = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    if kind != "axial" or groups != 1 or not is_number(theta) or theta <= 0:
        raise CheckpointError(
            f"config.json has rope_type {kind!r}, rope_theta {theta!r} and num_key_value_groups "
            f"{groups!r}: expected 'axial', a positive number and 1"
        )
    return {"rope": _build_rope(theta)}


def _write_rope(cfg: ViTConfig) -> dict[str, Any]:
    """Return the keys of config.json that are MLCD's own."""
    assert cfg.rope is not None
    return {"rope_parameters": {"rope_type": "axial", "rope_theta": cfg.rope.theta}}


MLCD = HfType(
    model_type="mlcd_vision_model",
    class_name="MLCDVision",
    prefix="vision_model.",
    trunk="",
    names=_NAMES,
    numbers={
        name: (key, _BIG_GIANT.get(key, default)) for name, (key, default) in TOWER_NUMBERS.items()
    },
    fixed={**BICUBIC_POSITIONS, "pos_embed": False, "pre_norm": True, "patch_bias": False},
    base={"pool": "cls", "final_norm": "pooled"},
    head=None,
    bare_fields={"rope": _build_rope(10000.0)},
    read_more=_read_rope,
    write_more=_write_rope,
    allowed=lambda cfg: {"rope": (_build_rope(cfg.rope.theta if cfg.rope else 10000.0),)},
)

FAMILY = Family(
    name="mlcd",
    title="MLCD vision tower",
    hf=MLCD,
    # transformers reads both types by one class.
    hf_variants=(MLCD.variant("mlcd", bare_fields=MLCD.bare_fields),),
    hf_published=(
        Published(
            MLCD.model_type, 1664, 8192, 16, (14,), "", "DeepGlint-AI/mlcd-vit-bigG-patch14-336"
        ),
    ),
    numerics={"hf": {"norm_eps": 1e-5}},
    libraries=("hf",),
    transforms={"hf": crop(1.0, BICUBIC, CLIP_STATS, "floor")},
)
