"""torchvision's published ViT weights: what each is evaluated with.

Its files hold tensors alone, and two published sets of one shape differ in their preprocessing; the
name of the file says which it is. Facts of torchvision 0.28, models/vision_transformer.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vitlib.rules.fields import IMAGENET, RESAMPLE, Fields, like_torchvision

_BILINEAR, _BICUBIC = 2, 3


class Weights(NamedTuple):
    """A published set of weights."""

    name: str  # of its torchvision enum
    shape: tuple[int, int, int]  # embed_dim, depth, patch side
    resize: int  # the shorter side
    crop: int  # the side of the model's images
    resample: int


_B16, _B32, _L16, _L32, _H14 = (
    (768, 12, 16), (768, 12, 32), (1024, 24, 16), (1024, 24, 32), (1280, 32, 14),
)  # fmt: skip
# By the names of their files, without checksum and ending.
PUBLISHED = {
    "vit_b_16": Weights("IMAGENET1K_V1", _B16, 256, 224, _BILINEAR),
    "vit_b_16_swag": Weights("IMAGENET1K_SWAG_E2E_V1", _B16, 384, 384, _BICUBIC),
    "vit_b_16_lc_swag": Weights("IMAGENET1K_SWAG_LINEAR_V1", _B16, 224, 224, _BICUBIC),
    "vit_b_32": Weights("IMAGENET1K_V1", _B32, 256, 224, _BILINEAR),
    "vit_l_16": Weights("IMAGENET1K_V1", _L16, 242, 224, _BILINEAR),
    "vit_l_16_swag": Weights("IMAGENET1K_SWAG_E2E_V1", _L16, 512, 512, _BICUBIC),
    "vit_l_16_lc_swag": Weights("IMAGENET1K_SWAG_LINEAR_V1", _L16, 224, 224, _BICUBIC),
    "vit_l_32": Weights("IMAGENET1K_V1", _L32, 256, 224, _BILINEAR),
    "vit_h_14_swag": Weights("IMAGENET1K_SWAG_E2E_V1", _H14, 518, 518, _BICUBIC),
    "vit_h_14_lc_swag": Weights("IMAGENET1K_SWAG_LINEAR_V1", _H14, 224, 224, _BICUBIC),
}
# With a checksum, as torchvision names them, or with the part that only such weights have.
_NAME = re.compile(r"(?<![a-z0-9])(vit_[blh]_\d\d)(_lc_swag|_swag)?(-[0-9a-f]{8})?(?![a-z0-9_])")


def torchvision_fields(
    file_name: str, shape: tuple[int, int, int], image_size: tuple[int, int]
) -> tuple[Fields | None, str]:
    """Find the preprocessing of torchvision's weights.

    Args:
        file_name: of the weights.
        shape: embed_dim, depth and the patch's side.
        image_size: (height, width) of the model's images.

    Returns:
        ImageProcessor's fields, None where no published weights have this shape; and what was
        assumed, in one line, "" where nothing was.
    """
    fitting = {
        name: weights
        for name, weights in PUBLISHED.items()
        if weights.shape == shape and (weights.crop, weights.crop) == image_size
    }
    if not fitting:
        return None, (
            "preprocessing is assumed to be that of torchvision's models of this size, as no "
            "published weights have this shape: where it is another give image_processor="
        )
    said = _NAME.search(file_name.lower())
    name = said.group(1) + (said.group(2) or "") if said else ""
    sure = len(fitting) == 1 or (
        said is not None and name in fitting and any(said.group(part) for part in (2, 3))
    )
    name = name if name in fitting else next(iter(fitting))
    chosen = fitting[name]
    fields = like_torchvision(
        (chosen.resize, chosen.resize), image_size, chosen.resample, [*IMAGENET]
    )
    if sure:
        return fields, ""
    others = ", ".join(other for other in fitting if other != name)
    return fields, (
        f"preprocessing is assumed to be that of torchvision's {name} {chosen.name} (resize "
        f"{chosen.resize}, {RESAMPLE[chosen.resample]}, crop {chosen.crop}): {others} has the same "
        "shape and another one; name the file as published, or give image_processor="
    )
