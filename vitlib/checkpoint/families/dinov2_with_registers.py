"""DINOv2 with registers (2309.16588)."""

from __future__ import annotations

from dataclasses import replace

from vitlib.checkpoint.families.dinov2 import DINOV2, NUMBERS, TRANSFORMS
from vitlib.checkpoint.families.family import BASE, LARGE, SMALL, Family, Published

_TYPE = "dinov2_with_registers"
_HF = replace(
    DINOV2,
    model_type=_TYPE,
    class_name="Dinov2WithRegisters",
    prefix="dinov2_with_registers.",
    numbers={
        **NUMBERS,
        "patch_size": ("patch_size", 16),
        "num_registers": ("num_register_tokens", 4),
    },
    fixed={"position_resize": "bicubic_antialias"},
)

FAMILY = Family(
    name=_TYPE,
    title="DINOv2 with registers",
    hf=_HF,
    hf_published=(
        Published(_TYPE, *SMALL, (14,), "", "facebook/dinov2-with-registers-small"),
        Published(_TYPE, *BASE, (14,), "", "facebook/dinov2-with-registers-base"),
        Published(_TYPE, *LARGE, (14,), "", "facebook/dinov2-with-registers-large"),
        Published(_TYPE, 1536, 4096, 24, (14,), "swiglu", "facebook/dinov2-with-registers-giant"),
    ),
    numerics={
        "hf": {"norm_eps": 1e-6, "position_resize": "bicubic_antialias"},
        "original": {"position_resize": "bicubic_antialias"},
    },
    timm_architecture="vit_base_patch14_reg4_dinov2",
    transforms=TRANSFORMS,
    uniform_libraries=("original", "timm"),
)
