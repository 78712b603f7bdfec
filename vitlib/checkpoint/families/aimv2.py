"""AIMv2 (2411.14402): RMSNorm, gated MLPs, no biases, no class token; and Ovis2 (2405.20797)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vitlib.checkpoint.families.family import (
    MEAN,
    Config,
    Container,
    Family,
    HfType,
    Mismatch,
    Published,
    Shapes,
    State,
    two_towers,
)
from vitlib.checkpoint.families.vit import BICUBIC_POSITIONS, NUMBERS
from vitlib.checkpoint.layouts.table import ROWS, NameMatch, Slice, Table
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms, Pooling
from vitlib.errors import CheckpointError
from vitlib.image.configs.transform import BICUBIC, CLIP_STATS, crop
from vitlib.patch_embed import compute_sincos_positions

_POS = "patch_embed.pos_embed"
_NAMES: Table = {
    _POS: Slice("embeddings.position_embedding.weight", reshape=ROWS),
    "patch_embed.proj": "embeddings.patch_embed",
    "patch_embed.norm": "embeddings.rms_norm",
    "blocks.{}.norm1": "encoder.layers.{}.rms_norm1",
    "blocks.{}.norm2": "encoder.layers.{}.rms_norm2",
    "blocks.{}.attn.q": "encoder.layers.{}.attention.q_proj",
    "blocks.{}.attn.k": "encoder.layers.{}.attention.k_proj",
    "blocks.{}.attn.v": "encoder.layers.{}.attention.v_proj",
    "blocks.{}.attn.proj": "encoder.layers.{}.attention.out_proj",
    "blocks.{}.mlp.fc1": (
        "encoder.layers.{}.ffn.gate_proj",
        "encoder.layers.{}.ffn.up_proj",
    ),
    "blocks.{}.mlp.fc2": "encoder.layers.{}.ffn.down_proj",
    "norm": "rms_norm",
    "attn_pool.probe": "head.cls_token",
    "attn_pool.k": "head.k_proj",
    "attn_pool.v": "head.v_proj",
    "attn_pool.proj": "head.output_proj",
}
_NUMBERS: dict[str, tuple[str, Any]] = {
    **NUMBERS,
    "patch_size": ("patch_size", 14),
    "embed_dim": ("hidden_size", 1024),
    "depth": ("num_hidden_layers", 24),
    "num_heads": ("num_attention_heads", 8),
    "mlp_dim": ("intermediate_size", 2816),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "qkv_bias": ("qkv_bias", False),
    "attention_dropout": ("attention_dropout", 0.0),
}
_POOL = Pooling(q_proj=False, mlp=False)


def _read_more(config: Config, fields: Config) -> dict[str, Any]:
    """Read biases and the kind of the positions; raise CheckpointError for biases of one branch."""
    bias = config.get("mlp_bias", False)
    if bias is not fields["qkv_bias"]:
        raise CheckpointError(
            f"config.json has mlp_bias {bias!r} with qkv_bias {fields['qkv_bias']!r}: vitlib's "
            "block has both or neither"
        )
    computed = {"position_resize": "sincos"} if config.get("is_native", False) else {}
    return {"proj_bias": bias, **computed}


def _infer_parts(name_match: NameMatch | None, _: bool) -> Mapping[str, Any]:
    """Return the pool, and the positions that a file without a table computes."""
    if name_match is None:
        return {}
    names = name_match.matches
    parts: dict[str, Any] = {"attention_pool": _POOL} if "attn_pool.probe" in names else {}
    return parts if _POS in names else {**parts, "pos_embed": True, "position_resize": "sincos"}


def _list_mismatches(_: Config, tower: Config, shapes: Shapes, __: NameMatch) -> list[Mismatch]:
    """Return use_head and is_native where the tensors say otherwise."""
    stated = {
        "use_head": (tower.get("use_head", True), "attn_pool.probe" in shapes),
        "is_native": (tower.get("is_native", False), _POS not in shapes),
    }
    return [(key, value, actual) for key, (value, actual) in stated.items() if value != actual]


def _write_more(cfg: ViTConfig) -> dict[str, Any]:
    """Return the keys of config.json that are AIMv2's own."""
    return {
        "hidden_act": "silu",
        "mlp_bias": cfg.biases.proj,
        "use_head": cfg.attention_pool is not None,
        "is_native": cfg.positions.resize == "sincos",
    }


def _allow(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values that AIMv2's class computes: biases everywhere or nowhere, its own pool."""
    return {
        "activation": ("swiglu",),
        "proj_bias": (cfg.biases.qkv,),
        "attention_pool": (None, _POOL),
    }


def _fill_positions(cfg: ViTConfig, state: State, _: Config) -> None:
    """Add the table of positions that a file leaves to the code."""
    if cfg.positions.resize == "sincos" and _POS not in state and "norm.weight" in state:
        table = compute_sincos_positions(cfg.grid_size, cfg.embed_dim)
        state[_POS] = table.to(state["norm.weight"].dtype)


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config without an unused pool, and without a table that the class computes."""
    if cfg.pool == "mean":
        for name in [name for name in state if name.startswith("attn_pool.")]:
            del state[name]
        cfg = replace(cfg, attention_pool=None)
    if cfg.positions.resize != "sincos" or not cfg.positions.embed:
        return cfg
    table = compute_sincos_positions(cfg.grid_size, cfg.embed_dim)
    if torch.equal(table.to(state[_POS].dtype), state[_POS]):
        del state[_POS]
        return cfg
    # Training changed the table.
    return replace(cfg, positions=replace(cfg.positions, resize="bicubic"))


_TYPE = "aimv2_vision_model"
# timm's config.json of each model states its transform: this is that of most.
_TRANSFORM = crop(1.0, BICUBIC, CLIP_STATS)

_OVIS2 = "ovis2_vision"
AIMV2 = HfType(
    model_type=_TYPE,
    class_name="Aimv2Vision",
    prefix="",
    trunk="",
    names=_NAMES,
    numbers=_NUMBERS,
    fixed={
        **BICUBIC_POSITIONS,
        "class_token": False,
        "norms": Norms(kind="rms", patch=True),
    },
    base={"pool": "map", "final_norm": "tokens"},
    base_pools={"mean": "tokens"},
    head=None,
    activation="silu",
    gated=True,
    read_more=_read_more,
    write_more=_write_more,
    infer_pooling=_infer_parts,
    list_mismatches=_list_mismatches,
    allowed=_allow,
    absorb=_fill_positions,
)

FAMILY = Family(
    name="aimv2",
    title="AIMv2",
    hf=AIMV2,
    hf_variants=(
        AIMV2.variant(
            _OVIS2,
            class_name="Ovis2Vision",
            trunk="transformer",
            base=MEAN,
            infer_pooling=lambda *_: {},
            list_mismatches=lambda *_: [],
        ),
    ),
    hf_containers={
        "aimv2": two_towers(_TYPE),
        "ovis2": Container(model_type=_OVIS2, any_type=False),
    },
    hf_published=(
        Published(_TYPE, 1024, 2816, 8, (14,), "swiglu", "apple/aimv2-large-patch14-native"),
    ),
    to_hf=_to_hf,
    numerics={"hf": {"norm_eps": 1e-5}, "timm": {"norm_eps": 1e-05}},
    timm_architecture="aimv2_large_patch14_224",
    timm_only=True,
    timm_word="aimv2",
    libraries=("hf", "timm"),
    transforms={"hf": replace(_TRANSFORM, crop_rounding="floor"), "timm": _TRANSFORM},
)
