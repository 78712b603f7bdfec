"""MSN (2204.07141)."""

from __future__ import annotations

from vitlib.checkpoint.families.family import BASE, LARGE, SMALL, Family, HfType, Published
from vitlib.checkpoint.families.vit import NAMES, VIT_FIXED, VIT_NUMBERS
from vitlib.image.configs.transform import BILINEAR, CROP_PCT, IMAGENET_STATS, crop, squash

FAMILY = Family(
    name="vit_msn",
    title="MSN",
    hf=HfType(
        model_type="vit_msn",
        class_name="ViTMSN",
        prefix="vit.",
        names=NAMES,
        numbers={**VIT_NUMBERS, "norm_eps": ("layer_norm_eps", 1e-6)},
        fixed=VIT_FIXED,
        reads_head_dim=True,
    ),
    hf_published=(
        Published("vit_msn", *SMALL, (16,), "", "facebook/vit-msn-small"),
        Published("vit_msn", *BASE, (4, 16), "", "facebook/vit-msn-base"),
        Published("vit_msn", *LARGE, (7, 16), "", "facebook/vit-msn-large"),
    ),
    hf_twin="vit",
    hf_marks=("vit_msn.",),
    numerics={"hf": {"norm_eps": 1e-6}, "original": {"position_resize": "bicubic_fp32"}},
    original_wrapper="target_encoder",
    # Its projection head; a plain fc.weight is a classifier of training code.
    original_marks=("fc.fc", "fc.bn"),
    transforms={
        "hf": squash(BILINEAR, IMAGENET_STATS),
        "original": crop(CROP_PCT, BILINEAR, IMAGENET_STATS),
    },
    uniform_libraries=("original", "timm"),
)
