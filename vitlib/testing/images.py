"""Seeded images on which models are compared.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitlib.config import ViTConfig

NUM_IMAGES = 2
_SEED = 0
_CROP_PATCHES = 32


def usual_size(cfg: ViTConfig) -> tuple[int, int]:
    """Return the size of images on which checks run a model.

    Args:
        cfg: The model's config.

    Returns:
        (height, width) in pixels: those of its positions. C-RADIO's are of 2048 pixels, of which it
        uses a part: at most 32 patches a side.
    """
    (h, w), (p, q) = cfg.image_size, cfg.patch_size
    if cfg.positions.resize != "bilinear_square":
        return h, w
    return min(h, _CROP_PATCHES * p), min(w, _CROP_PATCHES * q)


def seeded_images(cfg: ViTConfig, size: tuple[int, int] | None = None) -> Tensor:
    """Return two images of normal pixels, the same in every run.

    Args:
        cfg: The model's config.
        size: (height, width) in pixels; None takes the usual size.

    Returns:
        (2, C, H, W) float32.
    """
    generator = torch.Generator().manual_seed(_SEED)
    shape = (NUM_IMAGES, cfg.in_channels, *(size or usual_size(cfg)))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def off_grid_size(cfg: ViTConfig) -> tuple[int, int]:
    """Return a size one patch larger than the usual size, where positions are resized.

    Args:
        cfg: The model's config.

    Returns:
        (height, width) in pixels.
    """
    (h, w), (p, q) = usual_size(cfg), cfg.patch_size
    return h + p, w + q
