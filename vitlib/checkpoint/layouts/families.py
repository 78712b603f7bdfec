"""The families of plain ViT, and the numerics that each library runs them with.

A file's tensors do not say their norm eps, their form of GELU or how positions are resized: the
library they come from does. A profile is one library's habits, by family; "*" is every other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from vitlib.config import ViTConfig
from vitlib.errors import ConfigError

Profile = Literal["hf", "timm", "original", "jax", "torchvision"]

FAMILIES = {
    "vit": "ViT, DeiT, DINO",
    "deit": "DeiT with a distillation token",
    "deit3": "DeiT-III",
    "vit_mae": "MAE encoder",
    "vit_msn": "MSN",
    "ijepa": "I-JEPA",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "dinov3_vit": "DINOv3",
    "clip": "CLIP vision tower",
    "siglip": "SigLIP and SigLIP 2 (fixed size) vision tower",
    "beit": "BEiT",
    "data2vec": "data2vec vision",
}


def _numbers(norm_eps: float, activation: str, position_resize: str) -> dict[str, Any]:
    return {
        "norm_eps": norm_eps,
        "activation": activation,
        "position_resize": position_resize,
    }


# Facts of transformers 5.23, timm 1.0.31, torchvision 0.28, open_clip 3.3, the families' own code.
PROFILES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "hf": {
        "*": _numbers(1e-12, "gelu", "bicubic"),
        "vit_msn": _numbers(1e-6, "gelu", "bicubic"),
        "ijepa": _numbers(1e-6, "gelu", "bicubic"),
        "deit3": _numbers(1e-6, "gelu", "bicubic_fp32"),  # as a DINOv2: see hf.py
        "dinov2": _numbers(1e-6, "gelu", "bicubic_fp32"),
        "dinov2_with_registers": _numbers(1e-6, "gelu", "bicubic_antialias"),
        "dinov3_vit": _numbers(1e-5, "gelu", "bicubic"),
        "clip": _numbers(1e-5, "quick_gelu", "bicubic"),
        "siglip": _numbers(1e-6, "gelu_tanh", "bicubic"),
    },
    "timm": {
        "*": _numbers(1e-6, "gelu", "bicubic_antialias"),
        "dinov3_vit": _numbers(1e-5, "gelu", "bicubic_antialias"),
        "clip": _numbers(1e-5, "quick_gelu", "bicubic_antialias"),
    },
    "original": {
        "*": _numbers(1e-6, "gelu", "bicubic_offset"),
        "deit": _numbers(1e-6, "gelu", "bicubic_fp32"),
        "deit3": _numbers(1e-6, "gelu", "bicubic_fp32"),
        "vit_mae": _numbers(1e-6, "gelu", "bicubic_fp32"),
        "vit_msn": _numbers(1e-6, "gelu", "bicubic_fp32"),
        "ijepa": _numbers(1e-6, "gelu", "bicubic_fp32"),
        "dinov2_with_registers": _numbers(1e-6, "gelu", "bicubic_antialias"),
        "dinov3_vit": _numbers(1e-5, "gelu", "bicubic_antialias"),
        "clip": _numbers(1e-5, "quick_gelu", "bicubic_antialias"),  # as open_clip resizes
        "siglip": _numbers(1e-6, "gelu", "bicubic_antialias"),  # open_clip runs timm's tower
    },
    "jax": {"*": _numbers(1e-6, "gelu_tanh", "bilinear_corners")},
    "torchvision": {"*": _numbers(1e-6, "gelu", "bicubic_corners")},
}


def numerics(profile: str, family: str) -> dict[str, Any]:
    """The numerics a library runs a family with. Raises ConfigError for no profile's name."""
    if profile not in PROFILES:
        raise ConfigError(f"profile={profile!r}: expected one of {', '.join(get_args(Profile))}")
    table = PROFILES[profile]
    found = dict(table.get(family, table["*"]))
    if family in ("beit", "data2vec"):
        found["relative_resize"] = "bilinear" if profile == "hf" else "geometric"
    return found


def with_profile(cfg: ViTConfig, profile: str) -> ViTConfig:
    """The model as that library would run its tensors.

    A gated MLP stays so, and CLIP keeps its own form of GELU, which is the checkpoint's.
    """
    changes = numerics(profile, cfg.family)
    if cfg.activation == "swiglu" or cfg.family == "clip":
        del changes["activation"]
    return replace(cfg, **changes)


def guess_num_heads(embed_dim: int, family: str) -> int:
    """How many heads the published models of this width have: heads of 64, but for a few."""
    wide = {1280: 16, 1408: 16, 1152: 16, 1664: 16, 4096: 32}
    if embed_dim in wide and not (embed_dim == 1280 and family == "dinov3_vit"):
        return wide[embed_dim]
    return next(n for n in range(max(embed_dim // 64, 1), 0, -1) if embed_dim % n == 0)
