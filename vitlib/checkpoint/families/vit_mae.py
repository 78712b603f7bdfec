"""MAE (2111.06377): the encoder alone; transformers' class hides no patches by mask_ratio 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vitlib.checkpoint.families.family import BASE, HUGE, LARGE, Family, HfType, Published, State
from vitlib.checkpoint.families.vit import NAMES, VIT_FIXED, VIT_NUMBERS, to_beit
from vitlib.config import ViTConfig
from vitlib.image.configs.transform import (
    BICUBIC,
    BILINEAR,
    CROP_PCT,
    IMAGENET_STATS,
    crop,
    squash,
    uncropped_from,
)


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config as BEiT's or ViT's where it has a head, which ViTMAE has not."""
    cfg = to_beit(cfg, state)
    return replace(cfg, family="vit") if cfg.family == "vit_mae" and cfg.num_classes else cfg


def _keep_patches(reference: Any, cfg: ViTConfig, num_images: int) -> dict[str, Any]:
    """Switch masking off, and return the noise that keeps the order of patches."""
    reference.config.mask_ratio = 0.0
    count = cfg.grid_size[0] * cfg.grid_size[1]
    return {"noise": torch.arange(count, dtype=torch.float32).expand(num_images, -1)}


FAMILY = Family(
    name="vit_mae",
    title="MAE encoder",
    hf=HfType(
        model_type="vit_mae",
        class_name="ViTMAE",
        prefix="vit.",
        names=NAMES,
        numbers=VIT_NUMBERS,
        fixed=VIT_FIXED,
        head=None,
        run_arguments=_keep_patches,
        reads_head_dim=True,
        # transformers' default is 0.75: an encoder hides no patches.
        write_more=lambda _: {"mask_ratio": 0.0},
    ),
    hf_published=(
        Published("vit_mae", *BASE, (16,), "", "facebook/vit-mae-base"),
        Published("vit_mae", *LARGE, (16,), "", "facebook/vit-mae-large"),
        Published("vit_mae", *HUGE, (14,), "", "facebook/vit-mae-huge"),
    ),
    hf_twin="vit",
    hf_marks=("decoder.decoder_",),
    to_hf=_to_hf,
    numerics={"original": {"position_resize": "bicubic_fp32"}},
    original_wrapper="model",
    transforms={
        "hf": squash(BILINEAR, IMAGENET_STATS),
        "original": uncropped_from(225, crop(CROP_PCT, BICUBIC, IMAGENET_STATS)),
    },
    uniform_libraries=("original", "timm"),
    timm_word="mae",
)
