"""RoPE-ViT (2403.13298): rotary positions, axial or learned, with absolute ones or without."""

from __future__ import annotations

from vitlib.checkpoint.families.family import Family
from vitlib.image.configs.transform import BICUBIC, IMAGENET_STATS, crop

# timm's config.json of each model states its transform: this is that of most.
FAMILY = Family(
    name="rope_vit",
    title="RoPE-ViT",
    numerics={"timm": {"norm_eps": 1e-06}},
    timm_architecture="vit_base_patch16_rope_224",
    timm_only=True,
    timm_word="_rope_",
    libraries=("timm",),
    transforms={"timm": crop(0.9, BICUBIC, IMAGENET_STATS)},
)
