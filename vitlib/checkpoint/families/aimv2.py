"""AIMv2 (2411.14402): RMSNorm, gated MLPs, no biases, no class token."""

from __future__ import annotations

from vitlib.checkpoint.families.family import Family
from vitlib.image.configs.transform import BICUBIC, CLIP_STATS, crop

# timm's config.json of each model states its transform: this is that of most.
FAMILY = Family(
    name="aimv2",
    title="AIMv2",
    numerics={"timm": {"norm_eps": 1e-05}},
    timm_architecture="aimv2_large_patch14_224",
    timm_only=True,
    timm_word="aimv2",
    libraries=("timm",),
    transforms={"timm": crop(1.0, BICUBIC, CLIP_STATS)},
)
