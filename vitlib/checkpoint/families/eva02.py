"""EVA-02 (2303.11331) and its CLIP towers: rotary positions, norms inside its branches."""

from __future__ import annotations

from vitlib.checkpoint.families.family import Family
from vitlib.image.configs.transform import BICUBIC, CLIP_STATS, crop

# timm's config.json of each model states its transform: this is that of most.
FAMILY = Family(
    name="eva02",
    title="EVA-02",
    numerics={"timm": {"norm_eps": 1e-06}},
    timm_architecture="eva02_base_patch14_224",
    timm_only=True,
    timm_word="eva02",
    libraries=("timm",),
    transforms={"timm": crop(0.9, BICUBIC, CLIP_STATS)},
)
