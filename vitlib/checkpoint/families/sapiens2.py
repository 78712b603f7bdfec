"""Sapiens2 (2604.21681): RMSNorm, norms of queries and keys, keys shared by heads."""

from __future__ import annotations

from vitlib.checkpoint.families.family import Family
from vitlib.image.configs.transform import BILINEAR, IMAGENET_STATS, squash

# timm's config.json of each model states its transform: this is that of most.
FAMILY = Family(
    name="sapiens2",
    title="Sapiens2",
    numerics={"timm": {"norm_eps": 1e-06}},
    timm_architecture="vit_base_patch16_sapiens2",
    timm_only=True,
    timm_word="sapiens2",
    libraries=("timm",),
    transforms={"timm": squash(BILINEAR, IMAGENET_STATS)},
)
