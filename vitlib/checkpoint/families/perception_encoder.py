"""Perception Encoder (2504.13181): rotary and absolute positions, a pool with heads of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vitlib.checkpoint.families.family import Config, Family, OriginalCode, Shapes
from vitlib.checkpoint.layouts.table import ROWS, TRANSPOSED, VECTOR, Slice, Table, fused_qkv
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms, Rope
from vitlib.errors import CheckpointError
from vitlib.image.configs.transform import BICUBIC, BILINEAR, HALF_STATS, crop, squash

_POOL_HEADS = 8
_GRID = (32, 32)  # of every published model without a pool
_BLOCK = "transformer.resblocks.{}"
# The names of OpenAI's CLIP, and an attention pool.
_NAMES: Table = {
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
    "attn_pool.probe": "attn_pool.probe",
    **fused_qkv("attn_pool", "attn_pool.attn.in_proj"),
    "attn_pool.proj": "attn_pool.attn.out_proj",
    "attn_pool.norm": "attn_pool.layernorm",
    "attn_pool.mlp.fc1": "attn_pool.mlp.c_fc",
    "attn_pool.mlp.fc2": "attn_pool.mlp.c_proj",
    "projection.weight": Slice("proj", reshape=TRANSPOSED),
}


def _is_own(names: Collection[str]) -> bool:
    """Return True for CLIP's names with this pool, or without CLIP's final norm."""
    if not any(name.startswith("transformer.resblocks.") for name in names):
        return False
    return "attn_pool.probe" in names or ("conv1.weight" in names and "ln_post.weight" not in names)


def _build_rope(class_token: bool) -> Rope:
    """Return the rotation: patches are numbered from 1 where a class token is at 0.

    Its code numbers the patches of any grid so; timm scales the numbers to the learned grid.
    """
    return Rope(theta=10000.0, coords="index", offset=float(class_token), axes="xy")


def _read(fields: Config, _: Shapes, published: Config) -> dict[str, Any]:
    """Return the rotation and the pool; the models without a pool give all tokens.

    Raises CheckpointError if the tensors may as well be those of CLIP without its final norm.
    """
    has_pool = fields["attention_pool"] is not None
    height, width = (
        n // p for n, p in zip(fields["image_size"], fields["patch_size"], strict=True)
    )
    is_published = bool(published) and (height, width) == _GRID
    if not (has_pool or is_published or published.get("is_stated")):
        raise CheckpointError(
            "CLIP's names without its final norm (ln_post), on a grid of "
            f"{height}x{width}: expected a published Perception Encoder, as PE-Spatial on 32x32; "
            "if it is another, state architecture='vit_pe_spatial_large_patch14_448' "
            "(--architecture) or the like"
        )
    return {
        "rope": _build_rope(fields["class_token"]),
        "final_norm": "tokens" if has_pool else "none",
        "pool": "map" if has_pool else "mean",
        "pool_heads": _POOL_HEADS,
        "pool_prefix": 1,
        "open_pool": not has_pool,
    }


def _allow(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values of fields that the code computes."""
    has_pool, heads = cfg.attention_pool is not None, 0
    if cfg.attention_pool is not None:
        heads = cfg.attention_pool.num_heads or cfg.num_heads
    return {
        "attention_pool": (cfg.attention_pool if heads == _POOL_HEADS else None,),
        "rope": (_build_rope(cfg.tokens.cls),),
        "norms": (Norms(),),
        "patch_bias": (False,),
        "pre_norm": (True,),
        "pos_embed": (True,),
        "pos_embed_cls": (True,),
        "activation": ("gelu",),
        "final_norm": ("tokens",) if has_pool else ("none",),
        "pool": ("map",) if has_pool else ("mean",),
        "num_classes": (0,),
        "projection_dim": (cfg.outputs.projection_dim,),
    }


# timm's config.json of each model states its transform: this is that of most.
FAMILY = Family(
    name="perception_encoder",
    title="Perception Encoder",
    numerics={
        "timm": {"norm_eps": 1e-05},
        "original": {"norm_eps": 1e-5, "position_resize": "bilinear"},
    },
    timm_architecture="vit_pe_core_base_patch16_224",
    timm_only=True,
    timm_word="vit_pe_",
    original=OriginalCode(
        is_own=_is_own,
        names=lambda _: _NAMES,
        spellings=(_NAMES,),
        read=_read,
        allowed=_allow,
    ),
    libraries=("timm", "original"),
    transforms={
        "timm": crop(1.0, BICUBIC, HALF_STATS),
        "original": squash(BILINEAR, HALF_STATS),
    },
)
