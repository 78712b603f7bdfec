"""BEiT (2106.08254): relative positions, no bias of keys, the mean of the patches normed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitlib.checkpoint.families.clip import LARGE_TOWER
from vitlib.checkpoint.families.family import (
    BASE,
    CLS,
    LARGE,
    Config,
    Container,
    Family,
    HfType,
    Mismatch,
    Published,
    Shapes,
)
from vitlib.checkpoint.families.vit import BICUBIC_POSITIONS, VIT_NUMBERS
from vitlib.checkpoint.families.vit import NAMES as VIT_NAMES
from vitlib.checkpoint.layouts.table import NameMatch, Table
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError
from vitlib.image.configs.transform import (
    BICUBIC,
    BILINEAR,
    CROP_PCT,
    HALF_STATS,
    crop,
    squash,
    uncropped_from,
)

_NUMBERS: dict[str, tuple[str, Any]] = {
    **{name: key for name, key in VIT_NUMBERS.items() if name != "qkv_bias"},
    "drop_path": ("drop_path_rate", 0.1),
    "layer_scale": ("layer_scale_init_value", 0.1),
    "pos_embed": ("use_absolute_position_embeddings", False),
}
_POSITIONS = "relative_position_bias.relative_position_bias_table"
_NAMES: Table = {
    **VIT_NAMES,
    "blocks.{}.ls1.gamma": "encoder.layer.{}.lambda_1",
    "blocks.{}.ls2.gamma": "encoder.layer.{}.lambda_2",
    "attn_position.tables.{}": f"encoder.layer.{{}}.attention.attention.{_POSITIONS}",
}
_SHARED: Table = {"attn_position.tables.{}": f"encoder.{_POSITIONS}"}
_POOLED_NORM: Table = {"norm": "pooler.layernorm"}
_IN_MEMORY: Table = {
    "blocks.{}.ls1.gamma": "layers.{}.lambda_1",
    "blocks.{}.ls2.gamma": "layers.{}.lambda_2",
    "attn_position.tables.{}": f"layers.{{}}.{_POSITIONS}",
}
_READ_SHARED: Table = {"attn_position.tables.0": f"encoder.{_POSITIONS}"}
_SHARED_IN_MEMORY: Table = {
    "attn_position.tables.0": "shared_position_bias.relative_position_bias_table"
}
_PREFIXES = ("beit.", "data2vec_vision.")
_POOLER_NORM = "pooler.layernorm.weight"
_MASKED_NORM = "the norm of a masked head"
MEAN_NORMED = {"pool": "mean", "final_norm": "pooled"}


def _more_names(cfg: ViTConfig) -> Table:
    """Return the rows that depend on the config: shared tables, and where the norm stands."""
    shared = _SHARED if cfg.positions.relative == "shared" else {}
    return {**shared, **(_POOLED_NORM if cfg.final_norm == "pooled" else {})}


def _norm_name(name_match: NameMatch | None) -> str:
    """Return the file's name of the last norm, _MASKED_NORM, or "" where there is no norm."""
    if name_match is None or "norm.weight" not in name_match.matches:
        return ""
    name = name_match.file_name("norm.weight")
    if name == "layernorm.weight" and any(
        part.file_name.startswith(_PREFIXES)
        for parts in name_match.matches.values()
        for part in parts
    ):
        return _MASKED_NORM
    return name


def _infer_pooling(name_match: NameMatch | None, has_head: bool) -> Mapping[str, Any]:
    """Return pool and final_norm by the names of the tensors.

    transformers never builds a classifier without a norm.
    """
    norm = _norm_name(name_match)
    if norm == _MASKED_NORM:
        return {"pool": "cls", "final_norm": "none"}
    if norm and not norm.endswith(_POOLER_NORM):
        return CLS
    if name_match is not None and not norm and not has_head:
        return {"pool": "mean", "final_norm": "none"}  # the base model without a pooler
    return MEAN_NORMED


def _read_more(config: Config, fields: Config) -> dict[str, Any]:
    """Return relative positions and layer scale, which BEiT says in keys of its own."""
    shared = bool(config.get("use_shared_relative_position_bias", False))
    block = bool(config.get("use_relative_position_bias", False))
    if shared and block:
        raise CheckpointError("config.json has a shared and a per-block relative position bias")
    return {
        "relative_position": "block" if block else "shared" if shared else None,
        "relative_resize": "bilinear",
        "layer_scale": fields["layer_scale"] or None,
    }


def _write_more(cfg: ViTConfig) -> dict[str, Any]:
    """Return the keys of config.json that are BEiT's own."""
    return {
        "use_relative_position_bias": cfg.positions.relative == "block",
        "use_shared_relative_position_bias": cfg.positions.relative == "shared",
        "use_mean_pooling": cfg.final_norm == "pooled",
        "use_mask_token": cfg.tokens.mask,
        "layer_scale_init_value": float(cfg.layer_scale or 0),
    }


def _list_mismatches(_: Config, tower: Config, __: Shapes, name_match: NameMatch) -> list[Mismatch]:
    """Return use_mean_pooling where it says another pooling than the norm's name."""
    norm = _norm_name(name_match)
    if not norm or norm == _MASKED_NORM:
        return []
    mean = bool(tower.get("use_mean_pooling", True))
    return [] if mean == norm.endswith(_POOLER_NORM) else [("use_mean_pooling", mean, norm)]


BEIT = HfType(
    model_type="beit",
    class_name="Beit",
    prefix="beit.",
    names=_NAMES,
    more_names=_more_names,
    numbers=_NUMBERS,
    fixed={**BICUBIC_POSITIONS, "key_bias": False},
    base=MEAN_NORMED,
    head=MEAN_NORMED,
    base_pools={"cls": "tokens"},
    head_pools={"cls": "tokens"},
    reads_head_dim=True,
    masked_norm=True,
    read_more=_read_more,
    write_more=_write_more,
    infer_pooling=_infer_pooling,
    list_mismatches=_list_mismatches,
    allowed=lambda cfg: {"relative_position": (cfg.positions.relative,)},
)
# Hugging Face's BEiT resizes position tables bilinearly; every other code in geometric steps.
NUMERICS: Mapping[str, Mapping[str, Any]] = {
    "hf": {"relative_resize": "bilinear"},
    **{
        library: {"relative_resize": "geometric"}
        for library in ("timm", "original", "jax", "torchvision")
    },
}

FAMILY = Family(
    name="beit",
    title="BEiT",
    hf=BEIT,
    hf_containers={
        "zoedepth": Container(
            key="backbone_config",
            model_type="beit",
            absent={**LARGE_TOWER, "image_size": 384, "use_relative_position_bias": True},
        )
    },
    hf_names=(_POOLED_NORM, _IN_MEMORY, _READ_SHARED, _SHARED_IN_MEMORY),
    hf_published=(
        Published("beit", *BASE, (16,), "", "microsoft/beit-base-patch16-224"),
        Published("beit", *LARGE, (16,), "", "microsoft/beit-large-patch16-224"),
    ),
    numerics=NUMERICS,
    timm_architecture="beit_base_patch16_224",
    original_wrapper="model",
    transforms={
        "hf": squash(BILINEAR, HALF_STATS),
        "timm": uncropped_from(384, crop(0.9, BICUBIC, HALF_STATS)),
        "original": uncropped_from(384, crop(CROP_PCT, BICUBIC, HALF_STATS)),
    },
    timm_word="beit",
)
