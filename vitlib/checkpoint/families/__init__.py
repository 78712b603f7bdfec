"""Families of plain ViT: one file a family, with every fact of it.

A family's file is read on first use. A file's tensors do not say their norm eps, their form of GELU
or how positions are resized: the library they come from does, and a family may differ from it. The
same is true of the evaluation transform, which many files do not state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, Literal, get_args

from vitlib.checkpoint.families.family import Family
from vitlib.config import ViTConfig
from vitlib.errors import ConfigError
from vitlib.image.configs.transform import (
    BICUBIC,
    BILINEAR,
    CROP_PCT,
    HALF_STATS,
    IMAGENET_STATS,
    EvalTransform,
    crop,
    squash,
    uncropped_from,
)

# A new family is a file of this folder and its name here.
FAMILY_NAMES = (
    "vit",
    "deit",
    "deit3",
    "vit_mae",
    "vit_msn",
    "ijepa",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "clip",
    "mlcd",
    "siglip",
    "beit",
    "data2vec",
    "eva02",
    "perception_encoder",
    "rope_vit",
    "naflexvit",
    "aimv2",
    "beit3",
    "sapiens2",
    "internvl",
    "pixio",
    "radio",
    "tipsv2",
    "vit5",
)
Profile = Literal["hf", "timm", "original", "jax", "torchvision"]


def _numerics(norm_eps: float, activation: str, position_resize: str) -> dict[str, Any]:
    return {"norm_eps": norm_eps, "activation": activation, "position_resize": position_resize}


# How each library runs a family that does not say otherwise.
PROFILES: Mapping[str, Mapping[str, Any]] = {
    "hf": _numerics(1e-12, "gelu", "bicubic"),
    "timm": _numerics(1e-6, "gelu", "bicubic_antialias"),
    "original": _numerics(1e-6, "gelu", "bicubic_offset"),
    "jax": _numerics(1e-6, "gelu_tanh", "bilinear_corners"),
    "torchvision": _numerics(1e-6, "gelu", "bicubic_corners"),
}
# How each library evaluates a family that does not say otherwise. Sources: transformers' conversion
# scripts and published files, timm 1.0.31's pretrained configurations, the families' own
# repositories, google-research/vision_transformer and torchvision 0.28's weights.
_TRANSFORMS: Mapping[str, EvalTransform] = {
    "hf": squash(BILINEAR, HALF_STATS),
    "timm": uncropped_from(384, crop(0.9, BICUBIC, IMAGENET_STATS)),
    "original": crop(CROP_PCT, BICUBIC, IMAGENET_STATS),
    # TensorFlow's resize there is bilinear without antialias; Pillow's has it, as is better.
    "jax": squash(BILINEAR, HALF_STATS),
    # IMAGENET1K_V1; from 384 on, the weights that were fine-tuned from SWAG's.
    "torchvision": replace(
        crop(CROP_PCT, BILINEAR, IMAGENET_STATS),
        from_side=384,
        changes={"crop_pct": 1.0, "resample": BICUBIC},
    ),
}
# Width -> number of heads of published models whose heads are not 64 wide.
_NUM_HEADS = {1280: 16, 1408: 16, 1152: 16, 1664: 16, 4096: 32}
_OTHER = Family(name="", title="")


@cache
def get_family(name: str) -> Family:
    """Return a family by its name.

    Args:
        name: One of FAMILY_NAMES; another name is of a family of which nothing is known.

    Returns:
        The family.
    """
    if name not in FAMILY_NAMES:
        return _OTHER
    family: Family = import_module(f"{__name__}.{name}").FAMILY
    return family


@cache
def list_families() -> tuple[Family, ...]:
    """Return every family, in the order of FAMILY_NAMES."""
    return tuple(get_family(name) for name in FAMILY_NAMES)


def get_numerics(profile: str, family: str) -> dict[str, Any]:
    """Return the numerics with which a library runs a family.

    Args:
        profile: A library, one of PROFILES.
        family: `ViTConfig.family`.

    Returns:
        norm_eps, activation and position_resize, and relative_resize where the family has it.

    Raises:
        ConfigError: There is no such profile.
    """
    _check_profile(profile)
    return {**PROFILES[profile], **get_family(family).numerics.get(profile, {})}


def _check_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise ConfigError(f"profile={profile!r}: expected one of {', '.join(get_args(Profile))}")


def get_transform(profile: str, family: str) -> EvalTransform:
    """Return the transform with which a library evaluates a family.

    A checkpoint's own file takes precedence: checkpoints of one family often differ.

    Args:
        profile: A library, one of PROFILES.
        family: `ViTConfig.family`, or a name in `Family.transform_variants`.

    Returns:
        The transform; the library's usual one for a family of which nothing is known.

    Raises:
        ConfigError: There is no such profile.
    """
    _check_profile(profile)
    variants: dict[str, Mapping[str, EvalTransform]] = {}
    for other in list_families():
        variants |= other.transform_variants
    transforms = variants.get(family, get_family(family).transforms)
    return transforms.get(profile, _TRANSFORMS[profile])


def with_profile(cfg: ViTConfig, profile: str) -> ViTConfig:
    """Return the config with which a library would run a model's tensors.

    A gated MLP stays so, and CLIP keeps its own form of GELU, which is the checkpoint's.

    Args:
        cfg: The model.
        profile: A library, one of PROFILES.

    Returns:
        The config with the library's numerics.

    Raises:
        ConfigError: There is no such profile.
    """
    changes = get_numerics(profile, cfg.family)
    if cfg.activation == "swiglu" or cfg.family == "clip":
        del changes["activation"]
    return replace(cfg, **changes)


def default_num_heads(embed_dim: int, family: str) -> int:
    """Return the number of heads of published models of a width: heads of 64, but for a few.

    Args:
        embed_dim: Width.
        family: `ViTConfig.family`.

    Returns:
        A divisor of the width.
    """
    counts = {**_NUM_HEADS, **get_family(family).num_heads}
    if embed_dim in counts:
        return counts[embed_dim]
    return next(n for n in range(max(embed_dim // 64, 1), 0, -1) if embed_dim % n == 0)
