"""Evaluation transforms: the resize, crop and normalisation by which a library evaluates models.

A checkpoint that states its preprocessing does not need one. `checkpoint/families/` has the
transform of each library for each family, made by the functions of this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vitlib.errors import to_pair
from vitlib.image.configs.fields import (
    CLIP_STATS,
    HALF_STATS,
    IMAGENET_STATS,
    Fields,
    Stats,
    torchvision_fields,
)

__all__ = [
    "BICUBIC",
    "BILINEAR",
    "CLIP_STATS",
    "CROP_PCT",
    "HALF_STATS",
    "IMAGENET_STATS",
    "EvalTransform",
    "crop",
    "squash",
    "transform_fields",
    "uncropped_from",
]

BILINEAR, BICUBIC = 2, 3  # Pillow's codes
CROP_PCT = 224 / 256  # the crop of torchvision's evaluation of ImageNet


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """A transform at any image size.

    Attributes:
        kind: "squash" resizes both sides to the size and ignores the aspect ratio; "crop" resizes
            the shorter side and crops the centre.
        crop_pct: Side of the crop divided by the side of the resized image.
        resample: Pillow's code of the filter.
        stats: Mean and std, a number a channel.
        crop_rounding: Rounding of the crop's corner, one of CROP_ROUNDINGS.
        float_resize: Pixels are resized as floats, not as bytes.
        image_size: Side of the pixels; None: the model's image size.
        from_side: Models of at least this image size have the values of `changes`.
        changes: Field -> value at these sizes.
    """

    kind: Literal["squash", "crop"]
    crop_pct: float
    resample: int
    stats: Stats
    crop_rounding: str
    float_resize: bool = False
    image_size: int | None = None
    from_side: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def squash(resample: int, stats: Stats, crop_pct: float = 1.0) -> EvalTransform:
    """Describe a resize of both sides that ignores the aspect ratio.

    Args:
        resample: Pillow's code of the filter.
        stats: Mean and std, a number a channel.
        crop_pct: Side of the crop divided by the side of the resized image; 1: no crop.

    Returns:
        The transform.
    """
    return EvalTransform(
        kind="squash", crop_pct=crop_pct, resample=resample, stats=stats, crop_rounding="floor"
    )


def crop(crop_pct: float, resample: int, stats: Stats, rounding: str = "even") -> EvalTransform:
    """Describe a resize of the shorter side and a crop of the centre.

    Args:
        crop_pct: Side of the crop divided by the side of the resized image.
        resample: Pillow's code of the filter.
        stats: Mean and std, a number a channel.
        rounding: Rounding of the crop's corner, one of CROP_ROUNDINGS.

    Returns:
        The transform.
    """
    return EvalTransform(
        kind="crop", crop_pct=crop_pct, resample=resample, stats=stats, crop_rounding=rounding
    )


def uncropped_from(side: int, transform: EvalTransform) -> EvalTransform:
    """Describe a transform that crops nothing from a size on.

    Checkpoints that were fine-tuned at a larger size are evaluated so.

    Args:
        side: The smallest image size without a crop.
        transform: The transform of smaller sizes.

    Returns:
        The transform.
    """
    return replace(transform, from_side=side, changes={"crop_pct": 1.0})


def transform_fields(transform: EvalTransform, image_size: int | tuple[int, int]) -> Fields:
    """Return the fields of ImageProcessor that do a transform.

    Args:
        transform: The transform.
        image_size: Image size of the model, or its (height, width).

    Returns:
        All fields.
    """
    target = to_pair("image_size", transform.image_size or image_size)
    if transform.from_side is not None and max(target) >= transform.from_side:
        transform = replace(transform, **transform.changes)
        target = to_pair("image_size", transform.image_size or image_size)
    scaled = (
        math.floor(target[0] / transform.crop_pct),
        math.floor(target[1] / transform.crop_pct),
    )
    fields = torchvision_fields(scaled, target, transform.resample, list(transform.stats))
    fields |= {
        "crop_rounding": transform.crop_rounding,
        "float_resize": transform.float_resize,
    }
    if transform.kind == "squash":
        crop_size = target if scaled != target else None
        fields |= {"size": scaled, "shortest_edge": None, "fit": "squash", "crop_size": crop_size}
    elif transform.crop_rounding != "even":  # transformers knows no resize that covers an oblong
        fields |= {"size": None, "shortest_edge": max(scaled), "fit": "squash"}
    return fields
