"""I-JEPA (2301.08243): no class token; the mean of the patches."""

from __future__ import annotations

from vitlib.checkpoint.families.family import GIANT, HUGE, MEAN, Family, HfType, Published
from vitlib.checkpoint.families.vit import BICUBIC_POSITIONS, NAMES, VIT_NUMBERS
from vitlib.image.configs.transform import BILINEAR, HALF_STATS, squash

FAMILY = Family(
    name="ijepa",
    title="I-JEPA",
    hf=HfType(
        model_type="ijepa",
        class_name="IJepa",
        prefix="ijepa.",
        names=NAMES,
        numbers=VIT_NUMBERS,
        fixed={**BICUBIC_POSITIONS, "class_token": False},
        base=MEAN,
        head=MEAN,
        reads_head_dim=True,
        bare_fields={"norm_eps": 1e-6},  # of the published configs; the class's default is 1e-12
    ),
    hf_published=(
        Published("ijepa", *HUGE, (14, 16), "", "facebook/ijepa_vith14_1k"),
        Published("ijepa", *GIANT, (16,), "", "facebook/ijepa_vitg16_22k"),
    ),
    numerics={"hf": {"norm_eps": 1e-6}, "original": {"position_resize": "bicubic_fp32"}},
    timm_architecture="vit_huge_patch14_gap_224",
    original_wrapper="encoder",
    # Published files were converted with ViTImageProcessor's own mean and std.
    transforms={"hf": squash(BILINEAR, HALF_STATS)},
    timm_word="ijepa",
)
