"""BEiT-3's vision tower (2208.10442): norms inside attention and inside the MLP."""

from __future__ import annotations

from vitlib.checkpoint.families.family import Family
from vitlib.image.configs.transform import BICUBIC, IMAGENET_STATS, crop

# timm's config.json of each model states its transform: this is that of most.
FAMILY = Family(
    name="beit3",
    title="BEiT-3",
    numerics={"timm": {"norm_eps": 1e-05}},
    timm_architecture="beit3_base_patch16_224",
    timm_only=True,
    timm_word="beit3",
    libraries=("timm",),
    transforms={"timm": crop(1.0, BICUBIC, IMAGENET_STATS)},
)
