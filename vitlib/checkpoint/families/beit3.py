"""BEiT-3's vision tower (2208.10442): norms inside attention and inside the MLP."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from vitlib.checkpoint.families.family import Config, Family, OriginalCode, Shapes
from vitlib.checkpoint.layouts.table import Reshape, Slice, Table
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms
from vitlib.errors import CheckpointError
from vitlib.image.configs.transform import BICUBIC, HALF_STATS, IMAGENET_STATS, crop, squash

_LAYER = "beit3.encoder.layers.{}"
_POOLED, _ENCODED = "fc_norm.weight", "beit3.encoder.layer_norm.A.weight"
# Positions are numbered from 2, as in fairseq: two rows before them are read by no forward.
_FROM_TWO = Reshape(
    2, lambda t: t[None, 2:], lambda t, _: torch.cat([t.new_zeros(2, t.shape[2]), t[0]])
)
# Each module has a part A for images and a part B for text.
_NAMES: Table = {
    "patch_embed.cls_token": "beit3.vision_embed.cls_token",
    "patch_embed.mask_token": "beit3.vision_embed.mask_token",
    "patch_embed.proj": "beit3.vision_embed.proj",
    "patch_embed.pos_embed": Slice("beit3.encoder.embed_positions.A.weight", reshape=_FROM_TWO),
    "blocks.{}.norm1": f"{_LAYER}.self_attn_layer_norm.A",
    **{f"blocks.{{}}.attn.{name}": f"{_LAYER}.self_attn.{name}_proj.A" for name in "qkv"},
    "blocks.{}.attn.sub_norm": f"{_LAYER}.self_attn.inner_attn_ln.A",
    "blocks.{}.attn.proj": f"{_LAYER}.self_attn.out_proj.A",
    "blocks.{}.norm2": f"{_LAYER}.final_layer_norm.A",
    "blocks.{}.mlp.fc1": f"{_LAYER}.ffn.A.fc1",
    "blocks.{}.mlp.sub_norm": f"{_LAYER}.ffn.A.ffn_layernorm",
    "blocks.{}.mlp.fc2": f"{_LAYER}.ffn.A.fc2",
    "norm": "beit3.encoder.layer_norm.A",
    "projection": "vision_head",
    "head": "head",
}
_POOLED_NORM: Table = {"norm": "fc_norm"}


def _is_own(names: Collection[str]) -> bool:
    return any(name.startswith("beit3.") for name in names)


def _name_tensors(cfg: ViTConfig) -> Table:
    return {**_NAMES, **(_POOLED_NORM if cfg.final_norm == "pooled" else {})}


def _read(fields: Config, shapes: Shapes, _: Config) -> dict[str, Any]:
    """Return the pool: the mean of a classifier, else the class token."""
    if _POOLED in shapes and _ENCODED in shapes:
        raise CheckpointError(
            f"{_POOLED} after {_ENCODED}: vitlib computes one final norm; expected either, as in "
            "the published models"
        )
    if fields["final_norm"] == "none":
        raise CheckpointError(
            f"neither {_POOLED} nor {_ENCODED}, as in BEiT-3's models of images and texts together "
            "(VQA): expected a model of images alone"
        )
    if fields["final_norm"] == "pooled":
        return {"pool": "mean"}
    return {"pool": "cls", "open_pool": not fields["projection_dim"]}


def _allow(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values of fields that the code computes."""
    pooled = cfg.final_norm == "pooled"
    return {
        "norms": (Norms(attn=True, mlp=True),),
        "class_token": (True,),
        "pos_embed": (True,),
        "pos_embed_cls": (True,),
        "layer_scale": (None,),
        "activation": ("gelu",),
        "final_norm": ("tokens", "pooled"),
        "pool": ("mean",) if pooled else ("cls",),
        "num_classes": (cfg.num_classes,) if pooled else (0,),
        "projection_dim": (0,) if pooled else (0, cfg.embed_dim),
    }


# timm's config.json of each model states its transform: this is that of most.
FAMILY = Family(
    name="beit3",
    title="BEiT-3",
    numerics={
        "timm": {"norm_eps": 1e-05},
        "original": {"norm_eps": 1e-5, "position_resize": "bicubic"},
    },
    timm_architecture="beit3_base_patch16_224",
    timm_only=True,
    timm_word="beit3",
    original_wrapper="model",
    original=OriginalCode(
        is_own=_is_own,
        names=_name_tensors,
        spellings=(_NAMES, _POOLED_NORM),
        ignored=("beit3.text_embed.", "language_head.", "mlm_head.", "logit_scale", "criterion."),
        other_modality=".B.",
        read=_read,
        allowed=_allow,
        choose_transform=lambda cfg: "beit3" if cfg.final_norm == "pooled" else "beit3_encoder",
        turns_pairs=False,
    ),
    libraries=("timm", "original"),
    transforms={
        "timm": crop(1.0, BICUBIC, IMAGENET_STATS),
        "original": crop(1.0, BICUBIC, IMAGENET_STATS),
    },
    # Its code evaluates all models but the classifier so.
    transform_variants={"beit3_encoder": {"original": squash(BICUBIC, HALF_STATS)}},
)
