"""How two models are compared: the same seeded pixels, and how far apart what they give is.

Shapes: B images, C channels, H W pixels, T tokens, D embed_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from vitlib.config import ViTConfig
from vitlib.vit import ViT

IMAGES = 2
_SEED = 0


def probe(cfg: ViTConfig, size: tuple[int, int] | None = None) -> Tensor:
    """Two images of seeded normal pixels (2, C, H, W), float32, at the model's own size or `size`.

    The same numbers every time, so that two runs can be compared.
    """
    generator = torch.Generator().manual_seed(_SEED)
    shape = (IMAGES, cfg.in_channels, *(size or cfg.image_size))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def off_grid(cfg: ViTConfig) -> tuple[int, int]:
    """A size (height, width) one patch off the learned grid, where the positions are resized."""
    (h, w), (p, q) = cfg.image_size, cfg.patch_size
    return h + p, w + q


def distance(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; infinite where the shapes differ or one is not finite."""
    if a.shape != b.shape:
        return math.inf
    apart, most = float((a - b).abs().max()), float(b.abs().max())
    if not math.isfinite(apart) or not math.isfinite(most):
        return math.inf
    if not apart:
        return 0.0
    return apart / most if most else math.inf


def states(model: ViT, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(B, C, H, W) -> the tokens (B, T, D) after the embedding, after each block and after the
    final norm, then what the model gives; each with its name."""
    x = model.pre_norm(model.patch_embed(pixels))
    yield "embedding", x
    places = repeat(None) if model.positions is None else model.attn_positions(pixels)
    for index, (block, attn_pos) in enumerate(zip(model.blocks, places, strict=False)):
        x = block(x, None, attn_pos)
        yield f"block {index}", x
    if model.config.final_norm == "tokens":
        x = model.norm(x)
        yield "norm", x
    yield output_name(model.config), model.forward_head(x)


def output_name(cfg: ViTConfig) -> str:
    """What the model gives is called."""
    return "logits" if cfg.num_classes else "output"


def plain(value: Any) -> Any:
    """A value in types that JSON has: tuples as lists, what is not finite as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
