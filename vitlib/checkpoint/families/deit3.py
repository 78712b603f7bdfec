"""DeiT-III (2204.07118): layer scale, and a class token without a position."""

from __future__ import annotations

from dataclasses import replace

from vitlib.checkpoint.families.family import Family, State
from vitlib.config import ViTConfig
from vitlib.image.configs.transform import BICUBIC, CROP_PCT, IMAGENET_STATS, crop, squash


def _to_hf(cfg: ViTConfig, _: State) -> ViTConfig:
    """Return the config as DINOv2's: transformers has no DeiT-III, and DINOv2 has layer scale."""
    if cfg.layer_scale is None:
        return cfg
    return replace(cfg, family="dinov2_with_registers" if cfg.tokens.registers else "dinov2")


FAMILY = Family(
    name="deit3",
    title="DeiT-III",
    to_hf=_to_hf,
    numerics={
        # Files of transformers hold it as a DINOv2, which resizes so.
        "hf": {"norm_eps": 1e-6, "position_resize": "bicubic_fp32"},
        "original": {"position_resize": "bicubic_fp32"},
    },
    timm_architecture="deit3_base_patch16_224",
    original_wrapper="model",
    transforms={
        "hf": squash(BICUBIC, IMAGENET_STATS, CROP_PCT),
        "original": crop(1.0, BICUBIC, IMAGENET_STATS),
    },
    timm_word="deit3",
)
