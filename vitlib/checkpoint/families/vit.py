"""ViT (2010.11929), and files of the same tensors: DeiT without distillation, DINO, BLIP, DPT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitlib.checkpoint.families.family import (
    BASE,
    HUGE,
    LARGE,
    SMALL,
    TINY,
    Container,
    Family,
    HfType,
    Published,
    State,
    two_towers,
)
from vitlib.checkpoint.layouts.equivalences import drop_key_bias
from vitlib.checkpoint.layouts.table import ROWS, Slice, Table, fused_qkv
from vitlib.config import ViTConfig
from vitlib.image.configs.transform import (
    BICUBIC,
    BILINEAR,
    HALF_STATS,
    IMAGENET_STATS,
    crop,
    squash,
    uncropped_from,
)

# Field of ViTConfig -> key of config.json, and what transformers takes where the key is missing.
NUMBERS: dict[str, tuple[str, Any]] = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_channels": ("num_channels", 3),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
}
VIT_NUMBERS = {
    **NUMBERS,
    "mlp_dim": ("intermediate_size", 3072),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "qkv_bias": ("qkv_bias", True),
    "dropout": ("hidden_dropout_prob", 0.0),
    "attention_dropout": ("attention_probs_dropout_prob", 0.0),
}
DROP_PATH = {"drop_path": ("drop_path_rate", 0.0)}
BICUBIC_POSITIONS = {"position_resize": "bicubic"}
VIT_FIXED = {**BICUBIC_POSITIONS, "class_token": True}

EMBEDDING: Table = {
    "patch_embed.cls_token": "embeddings.cls_token",
    "patch_embed.pos_embed": "embeddings.position_embeddings",
    "patch_embed.mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
ATTENTION: Table = {
    "blocks.{}.attn.q": "encoder.layer.{}.attention.attention.query",
    "blocks.{}.attn.k": "encoder.layer.{}.attention.attention.key",
    "blocks.{}.attn.v": "encoder.layer.{}.attention.attention.value",
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.output.dense",
}
NAMES: Table = {
    **EMBEDDING,
    **ATTENTION,
    "blocks.{}.norm1": "encoder.layer.{}.layernorm_before",
    "blocks.{}.norm2": "encoder.layer.{}.layernorm_after",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.intermediate.dense",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.output.dense",
    "pooler": "pooler.dense",
}
# transformers 5 holds these tensors by other names in memory, and some tools save those.
IN_MEMORY: Table = {
    "blocks.{}.attn.q": "layers.{}.attention.q_proj",
    "blocks.{}.attn.k": "layers.{}.attention.k_proj",
    "blocks.{}.attn.v": "layers.{}.attention.v_proj",
    "blocks.{}.attn.proj": "layers.{}.attention.o_proj",
    "blocks.{}.norm1": "layers.{}.layernorm_before",
    "blocks.{}.norm2": "layers.{}.layernorm_after",
    "blocks.{}.mlp.fc1": "layers.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "layers.{}.mlp.fc2",
}
# DINOv2's files store the mask token as (1, D): this row reads (1, D) and (1, 1, D).
_MASK_TOKEN: Table = {"patch_embed.mask_token": Slice("embeddings.mask_token", reshape=ROWS)}
# BLIP: queries, keys and values in one tensor.
_BLIP_NAMES: Table = {
    "patch_embed.pos_embed": "embeddings.position_embedding",
    **fused_qkv("blocks.{}.attn", "encoder.layers.{}.self_attn.qkv", "."),
    "blocks.{}.attn.proj": "encoder.layers.{}.self_attn.projection",
}

VIT = HfType(
    model_type="vit",
    class_name="ViT",
    prefix="vit.",
    names=NAMES,
    numbers={**VIT_NUMBERS, **DROP_PATH},
    fixed=VIT_FIXED,
    reads_head_dim=True,
)
_BLIP: dict[str, Any] = {
    "without": ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
    "numbers": {"attention_dropout": ("attention_dropout", 0.0)},
}
_BLIP_2: dict[str, Any] = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39}
_BLIP_2 |= {"num_attention_heads": 16, "patch_size": 14, "layer_norm_eps": 1e-6}


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config as DINOv2's or BEiT's, whose classes have layer scale or a pooled norm."""
    if cfg.layer_scale is not None:
        return replace(cfg, family="dinov2_with_registers" if cfg.tokens.registers else "dinov2")
    return to_beit(cfg, state)


def to_beit(cfg: ViTConfig, state: State) -> ViTConfig:
    """Describe a model that norms the mean of its patches as BEiT, which does so.

    Args:
        cfg: The model.
        state: Tensors by vitlib's names; changed in place.

    Returns:
        The same function as BEiT, or the config itself where it pools otherwise.
    """
    if cfg.pool == "mean" and cfg.final_norm == "pooled":
        return drop_key_bias(replace(cfg, family="beit"), state)
    return cfg


FAMILY = Family(
    name="vit",
    title="ViT, DeiT, DINO",
    hf=VIT,
    hf_variants=(
        VIT.variant(
            "blip_vision_model", defaults={"image_size": 384, "layer_norm_eps": 1e-5}, **_BLIP
        ),
        VIT.variant("blip_2_vision_model", defaults=_BLIP_2, **_BLIP),
        VIT.variant("instructblip_vision_model", defaults=_BLIP_2, **_BLIP),
        VIT.variant("instructblipvideo_vision_model", defaults=_BLIP_2, **_BLIP),
        VIT.variant("flava_image_model"),
        VIT.variant(
            "dpt",
            defaults={"image_size": 384},
            without=("drop_path_rate",),
            fixed={"position_resize": "bilinear"},
        ),
    ),
    hf_containers={
        "blip": two_towers("blip_vision_model"),
        "blip-2": two_towers("blip_2_vision_model"),
        "instructblip": two_towers("instructblip_vision_model"),
        "instructblipvideo": two_towers("instructblipvideo_vision_model"),
        "flava": Container(key="image_config", model_type="flava_image_model", any_type=False),
    },
    hf_names=(_MASK_TOKEN, _BLIP_NAMES, IN_MEMORY),
    hf_published=(
        Published("vit", *TINY, (16,), "", "WinKawaks/vit-tiny-patch16-224"),
        Published("vit", *SMALL, (8, 16, 32), "", "facebook/dino-vits16"),
        Published("vit", *BASE, (8, 16, 32), "", "google/vit-base-patch16-224"),
        Published("vit", *LARGE, (16, 32), "", "google/vit-large-patch16-224"),
        Published("vit", *HUGE, (14,), "", "google/vit-huge-patch14-224-in21k"),
        Published("dpt", *LARGE, (16,), "", "Intel/dpt-large"),
        Published("blip_vision_model", *BASE, (16,), "", "Salesforce/blip-image-captioning-base"),
        Published("blip_vision_model", *LARGE, (16,), "", "Salesforce/blip-image-captioning-large"),
        Published("blip_2_vision_model", 1408, 6144, 16, (14,), "", "Salesforce/blip2-opt-2.7b"),
    ),
    to_hf=_to_hf,
    transforms={
        "hf": squash(BILINEAR, HALF_STATS),
        "timm": uncropped_from(384, crop(0.9, BICUBIC, HALF_STATS)),
        "original": squash(BILINEAR, HALF_STATS),
    },
    transform_variants={
        "dino": {"hf": squash(BILINEAR, IMAGENET_STATS)},
        # torchvision's IMAGENET1K_V1 of L/16 has 242 for 256; its linear SWAG weights.
        "vit_l_16": {"torchvision": crop(224 / 242, BILINEAR, IMAGENET_STATS)},
        "swag": {"torchvision": crop(1.0, BICUBIC, IMAGENET_STATS)},
    },
    libraries=("hf", "timm", "original", "jax", "torchvision"),
)
