"""DINOv3 (2508.10104): rotary positions, registers, layer scale, and no classifier."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitlib.checkpoint.families.dinov2 import allow_layer_scale
from vitlib.checkpoint.families.family import (
    BASE,
    LARGE,
    SMALL,
    Config,
    Container,
    Family,
    HfType,
    Published,
    State,
)
from vitlib.checkpoint.families.vit import BICUBIC_POSITIONS
from vitlib.checkpoint.families.vit import NUMBERS as VIT_SIZES
from vitlib.checkpoint.layouts.table import Table
from vitlib.config import ViTConfig
from vitlib.config_parts import Rope
from vitlib.errors import CheckpointError, is_number
from vitlib.image.configs.transform import BICUBIC, BILINEAR, IMAGENET_STATS, crop, squash

_NUMBERS: dict[str, tuple[str, Any]] = {
    **VIT_SIZES,
    "embed_dim": ("hidden_size", 384),
    "num_heads": ("num_attention_heads", 6),
    "mlp_dim": ("intermediate_size", 1536),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "qkv_bias": ("query_bias", True),
    "key_bias": ("key_bias", False),
    "attention_dropout": ("attention_dropout", 0.0),
    "drop_path": ("drop_path_rate", 0.0),
    "layer_scale": ("layerscale_value", 1.0),
    "num_registers": ("num_register_tokens", 0),
}
_NAMES: Table = {
    "patch_embed.cls_token": "embeddings.cls_token",
    "patch_embed.mask_token": "embeddings.mask_token",
    "patch_embed.reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "blocks.{}.norm1": "layer.{}.norm1",
    "blocks.{}.norm2": "layer.{}.norm2",
    "blocks.{}.attn.q": "layer.{}.attention.q_proj",
    "blocks.{}.attn.k": "layer.{}.attention.k_proj",
    "blocks.{}.attn.v": "layer.{}.attention.v_proj",
    "blocks.{}.attn.proj": "layer.{}.attention.o_proj",
    "blocks.{}.ls1.gamma": "layer.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "layer.{}.layer_scale2.lambda1",
    "blocks.{}.mlp.fc1": "layer.{}.mlp.up_proj",
    "blocks.{}.mlp.fc2": "layer.{}.mlp.down_proj",
    "norm": "norm",
}
# In the memory of transformers, Sapiens2's blocks have these names and two norms more.
_SAPIENS2_NORMS: Table = {
    "blocks.{}.attn.q_norm": "layer.{}.attention.q_norm",
    "blocks.{}.attn.k_norm": "layer.{}.attention.k_norm",
}
_GATED: Table = {"blocks.{}.mlp.fc1": ("layer.{}.mlp.gate_proj", "layer.{}.mlp.up_proj")}


_CHM: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_CHM |= {"intermediate_size": 4096, "image_size": 416, "layer_norm_eps": 1e-6, "key_bias": True}
_CHM |= {"num_register_tokens": 4}


def _read_rope(config: Config, fields: Config) -> dict[str, Any]:
    """Read the longest period; raise CheckpointError for biases that vitlib's block lacks."""
    fixed = {"value_bias": fields["qkv_bias"], "proj_bias": True, "mlp_bias": True}
    wrong = [
        f"{key} {config[key]}"
        for key, value in fixed.items()
        if config.get(key, value) is not value
    ]
    if fields["key_bias"] and not fields["qkv_bias"]:
        wrong.append("key_bias True with query_bias False")
    if wrong:
        raise CheckpointError(f"config.json has {', '.join(wrong)}: not in vitlib's block")
    theta = config.get("rope_theta", 100.0)
    if not is_number(theta) or theta <= 0:
        raise CheckpointError(f"config.json has rope_theta {theta!r}: expected a positive number")
    return {"rope": Rope(theta=theta)}


def _write_more(cfg: ViTConfig) -> dict[str, Any]:
    """Return the keys of config.json that are DINOv3's own."""
    gated = cfg.activation == "swiglu"
    more: dict[str, Any] = {"use_gated_mlp": gated, "value_bias": cfg.biases.qkv}
    more |= {"hidden_act": "silu"} if gated else {}
    theta = Rope().theta if cfg.rope is None else cfg.rope.theta
    return more | {"key_bias": cfg.biases.qkv and cfg.biases.key, "rope_theta": theta}


def _allow(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values that DINOv3's class computes: any period, and centres of patches."""
    return {**allow_layer_scale(cfg), "rope": (Rope(theta=cfg.rope.theta if cfg.rope else 100.0),)}


def _to_hf(cfg: ViTConfig, _: State) -> ViTConfig:
    """Return the config with transformers' pooler_output; save logs the pool as lost."""
    if not cfg.num_classes and cfg.final_norm == "tokens":
        return replace(cfg, pool="cls")
    return cfg


FAMILY = Family(
    name="dinov3_vit",
    title="DINOv3",
    hf=HfType(
        model_type="dinov3_vit",
        class_name="DINOv3ViT",
        prefix="",
        trunk="",  # the base model that its class names is the blocks alone
        names=_NAMES,
        more_names=lambda cfg: _GATED if cfg.activation == "swiglu" else {},
        numbers=_NUMBERS,
        fixed={**BICUBIC_POSITIONS, "pos_embed": False},
        head=None,
        bare_fields={"rope": Rope()},
        read_more=_read_rope,
        write_more=_write_more,
        allowed=_allow,
    ),
    hf_containers={"chmv2": Container(key="backbone_config", model_type="dinov3_vit", absent=_CHM)},
    # In other families up_proj is a half of a gated MLP; here it may be a whole MLP.
    hf_starts=("layer.",),
    hf_names=(_SAPIENS2_NORMS,),
    hf_published=(
        Published("dinov3_vit", *SMALL, (16,), "", "facebook/dinov3-vits16-pretrain-lvd1689m"),
        Published("dinov3_vit", *SMALL, (16,), "swiglu", "facebook/dinov3-vits16plus"),
        Published("dinov3_vit", *BASE, (16,), "", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
        Published("dinov3_vit", *LARGE, (16,), "", "facebook/dinov3-vitl16-pretrain-lvd1689m"),
        Published("dinov3_vit", 1280, 5120, 20, (16,), "swiglu", "facebook/dinov3-vith16plus"),
        Published("dinov3_vit", 4096, 8192, 32, (16,), "swiglu", "facebook/dinov3-vit7b16"),
    ),
    to_hf=_to_hf,
    numerics={
        "hf": {"norm_eps": 1e-5},
        "timm": {"norm_eps": 1e-5},
        "original": {"norm_eps": 1e-5, "position_resize": "bicubic_antialias"},
    },
    num_heads={1280: 20},
    timm_architecture="vit_base_patch16_dinov3",
    transforms={
        "hf": replace(squash(BILINEAR, IMAGENET_STATS), float_resize=True, crop_rounding="zero"),
        "timm": crop(1.0, BICUBIC, IMAGENET_STATS),
        # The original code resizes 8-bit tensors: one level apart at most.
        "original": squash(BILINEAR, IMAGENET_STATS),
    },
    timm_word="dinov3",
)
