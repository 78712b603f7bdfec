"""NaFlexVit of timm: a ViT whose positions keep their aspect ratio, also C-RADIO (2412.07679).

timm's SigLIP 2 NaFlex is the family siglip, whose class in transformers computes the same.
"""

from __future__ import annotations

from dataclasses import replace

from vitlib.checkpoint.families.family import Family
from vitlib.image.configs.transform import BICUBIC, CLIP_STATS, HALF_STATS, crop

# timm's config.json of each model states its transform. C-RADIO alone has positions of 2048 pixels:
# it takes photos of 512.
_TRANSFORM = replace(
    crop(1.0, BICUBIC, HALF_STATS),
    from_side=2048,
    changes={"image_size": 512, "stats": CLIP_STATS},
)
FAMILY = Family(
    name="naflexvit",
    title="NaFlexVit",
    numerics={"timm": {"norm_eps": 1e-06}},
    timm_architecture="naflexvit_base_patch16_gap",
    timm_only=True,
    libraries=("timm",),
    transforms={"timm": _TRANSFORM},
)
