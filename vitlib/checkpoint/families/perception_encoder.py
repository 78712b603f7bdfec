"""Perception Encoder (2504.13181): rotary and absolute positions, a pool with heads of its own."""

from __future__ import annotations

from vitlib.checkpoint.families.family import Family
from vitlib.image.configs.transform import BICUBIC, HALF_STATS, crop

# timm's config.json of each model states its transform: this is that of most.
FAMILY = Family(
    name="perception_encoder",
    title="Perception Encoder",
    numerics={"timm": {"norm_eps": 1e-05}},
    timm_architecture="vit_pe_core_base_patch16_224",
    timm_only=True,
    timm_word="vit_pe_",
    libraries=("timm",),
    transforms={"timm": crop(1.0, BICUBIC, HALF_STATS)},
)
