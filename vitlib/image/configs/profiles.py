"""Preprocessing of each library for each family, for checkpoints that state none.

Also for users who want another library's numbers. Sources: transformers' conversion scripts and
published files, timm 1.0.31's pretrained configurations, the families' own repositories,
google-research/vision_transformer and torchvision 0.28's weights. A checkpoint's own file takes
precedence: checkpoints of one family often differ among themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitlib.config import to_pair
from vitlib.errors import ConfigError
from vitlib.image.configs.fields import CLIP, HALF, IMAGENET, Fields, Stats, torchvision_fields

_BILINEAR, _BICUBIC = 2, 3
Profile = dict[str, Any]


def _squash(resample: int, stats: Stats, share: float = 1.0) -> Profile:
    """Resize both sides to the size, ignoring the aspect ratio; crop if the share is below 1."""
    return _profile("squash", share, resample, stats, "floor")


def _crop(share: float, resample: int, stats: Stats, rounding: str = "even") -> Profile:
    """Resize the shorter side to size / share, then crop the centre."""
    return _profile("crop", share, resample, stats, rounding)


def _profile(kind: str, share: float, resample: int, stats: Stats, rounding: str) -> Profile:
    return {
        "kind": kind,
        "crop_pct": share,
        "resample": resample,
        "mean": stats[0],
        "std": stats[1],
        "crop_rounding": rounding,
        "float_resize": False,
        "image_size": None,  # None: the model's own
        "from_side": None,  # for models of at least this side ...
        "then": {},  # ... these values replace the others
    }


def _uncropped_from(side: int, entry: Profile) -> Profile:
    """Crop nothing from this side on: checkpoints fine-tuned at larger sizes are evaluated so."""
    return entry | {"from_side": side, "then": {"crop_pct": 1.0}}


_SHARE = 224 / 256
_DINOV2 = {"image_size": 224}  # evaluated at 224, though the positions are those of 518

PROFILES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "hf": {
        "*": _squash(_BILINEAR, HALF),
        "vit": _squash(_BILINEAR, HALF),
        "deit": _squash(_BICUBIC, IMAGENET, _SHARE),
        "deit3": _squash(_BICUBIC, IMAGENET, _SHARE),
        "dino": _squash(_BILINEAR, IMAGENET),
        "vit_mae": _squash(_BILINEAR, IMAGENET),
        "vit_msn": _squash(_BILINEAR, IMAGENET),
        "ijepa": _squash(_BILINEAR, HALF),  # converted with ViTImageProcessor's own mean and std
        "dinov2": _crop(_SHARE, _BICUBIC, IMAGENET, "floor") | _DINOV2,
        "dinov2_with_registers": _crop(_SHARE, _BICUBIC, IMAGENET, "floor") | _DINOV2,
        "dinov3_vit": _squash(_BILINEAR, IMAGENET)
        | {"float_resize": True, "crop_rounding": "zero"},
        "clip": _crop(1.0, _BICUBIC, CLIP, "floor"),
        "siglip": _squash(_BICUBIC, HALF),
        "siglip2": _squash(_BILINEAR, HALF),
        "beit": _squash(_BILINEAR, HALF),
    },
    "timm": {
        "*": _uncropped_from(384, _crop(0.9, _BICUBIC, IMAGENET)),
        "vit": _uncropped_from(384, _crop(0.9, _BICUBIC, HALF)),
        "dinov2": _crop(1.0, _BICUBIC, IMAGENET),
        "dinov2_with_registers": _crop(1.0, _BICUBIC, IMAGENET),
        "dinov3_vit": _crop(1.0, _BICUBIC, IMAGENET),
        "clip": _crop(1.0, _BICUBIC, CLIP),  # of OpenAI's, base at 224 has 0.9
        "siglip": _crop(0.9, _BICUBIC, HALF),  # so400m's gap_378 and larger have 1.0
        "siglip2": _crop(0.9, _BICUBIC, HALF),
        "beit": _uncropped_from(384, _crop(0.9, _BICUBIC, HALF)),
    },
    "original": {
        "*": _crop(_SHARE, _BICUBIC, IMAGENET),
        "vit": _squash(_BILINEAR, HALF),
        "deit3": _crop(1.0, _BICUBIC, IMAGENET),
        "vit_mae": _uncropped_from(225, _crop(_SHARE, _BICUBIC, IMAGENET)),
        "vit_msn": _crop(_SHARE, _BILINEAR, IMAGENET),
        "dinov2": _crop(_SHARE, _BICUBIC, IMAGENET) | _DINOV2,
        "dinov2_with_registers": _crop(_SHARE, _BICUBIC, IMAGENET) | _DINOV2,
        "dinov3_vit": _squash(_BILINEAR, IMAGENET),  # there of 8-bit tensors: a level apart at most
        "clip": _crop(1.0, _BICUBIC, CLIP),
        "siglip": _squash(_BILINEAR, HALF),
        "siglip2": _squash(_BILINEAR, HALF),
        "beit": _uncropped_from(384, _crop(_SHARE, _BICUBIC, HALF)),
    },
    # TensorFlow's resize there is bilinear without antialias; Pillow's has it, as is better.
    "jax": {"*": _squash(_BILINEAR, HALF)},
    # IMAGENET1K_V1, of L/16 with 242 for 256; the SWAG weights, of 384 and more without a name.
    "torchvision": {
        "*": _crop(_SHARE, _BILINEAR, IMAGENET)
        | {"from_side": 384, "then": {"crop_pct": 1.0, "resample": _BICUBIC}},
        "vit_l_16": _crop(224 / 242, _BILINEAR, IMAGENET),
        "swag": _crop(1.0, _BICUBIC, IMAGENET),
    },
}


# Families whose published checkpoints all have the preprocessing of their profile.
UNIFORM_FAMILIES = frozenset(
    (profile, family)
    for profile in ("original", "timm")
    for family in ("dinov2", "dinov2_with_registers", "vit_mae", "vit_msn")
)


def profile_fields(profile: str, family: str, image_size: int | tuple[int, int]) -> Fields:
    """Return a library's preprocessing for a family.

    Args:
        profile: A key of PROFILES.
        family: model_type of transformers, or "deit3", "dino", "siglip2"; others have the library's
            default ("*").
        image_size: Image size of the model, or its (height, width).

    Returns:
        All fields.

    Raises:
        ConfigError: There is no such profile.
    """
    if profile not in PROFILES:
        raise ConfigError(f"profile={profile!r}: expected one of {', '.join(PROFILES)}")
    pieces = PROFILES[profile]
    entry = dict(pieces.get(family, pieces["*"]))
    target = to_pair("image_size", entry["image_size"] or image_size)
    if entry["from_side"] is not None and max(target) >= entry["from_side"]:
        entry |= entry["then"]
    scaled = (
        math.floor(target[0] / entry["crop_pct"]),
        math.floor(target[1] / entry["crop_pct"]),
    )
    stats = [entry["mean"], entry["std"]]
    fields = torchvision_fields(scaled, target, entry["resample"], stats)
    fields |= {
        "crop_rounding": entry["crop_rounding"],
        "float_resize": entry["float_resize"],
    }
    if entry["kind"] == "squash":
        crop = target if scaled != target else None
        fields |= {"size": scaled, "shortest_edge": None, "fit": "squash", "crop_size": crop}
    elif entry["crop_rounding"] != "even":  # transformers knows no resize that covers an oblong
        fields |= {"size": None, "shortest_edge": max(scaled), "fit": "squash"}
    return fields
