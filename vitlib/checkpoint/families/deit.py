"""DeiT (2012.12877) with a distillation token."""

from __future__ import annotations

from vitlib.checkpoint.families.family import BASE, SMALL, TINY, Family, HfType, Published
from vitlib.checkpoint.families.vit import DROP_PATH, NAMES, VIT_FIXED, VIT_NUMBERS
from vitlib.image.configs.transform import BICUBIC, CROP_PCT, IMAGENET_STATS, squash

FAMILY = Family(
    name="deit",
    title="DeiT with a distillation token",
    hf=HfType(
        model_type="deit",
        class_name="DeiT",
        prefix="deit.",
        names={**NAMES, "patch_embed.dist_token": "embeddings.distillation_token"},
        numbers={**VIT_NUMBERS, **DROP_PATH},
        fixed={**VIT_FIXED, "dist_token": True},
        reads_head_dim=True,
    ),
    hf_published=(
        Published("deit", *TINY, (16,), "", "facebook/deit-tiny-distilled-patch16-224"),
        Published("deit", *SMALL, (16,), "", "facebook/deit-small-distilled-patch16-224"),
        Published("deit", *BASE, (16,), "", "facebook/deit-base-distilled-patch16-224"),
    ),
    numerics={"original": {"position_resize": "bicubic_fp32"}},
    timm_architecture="deit_base_distilled_patch16_224",
    original_wrapper="model",
    transforms={"hf": squash(BICUBIC, IMAGENET_STATS, CROP_PCT)},
    timm_word="distilled",
)
