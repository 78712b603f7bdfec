"""A forward whose attention is written out, so that a gradient reaches its probabilities.

How data flows: the model's own parts in the model's own order, but for each attention, whose
probabilities are computed as a tensor of their own and kept; the logits equal forward's to
rounding. No hook, and the model is left as it is.

Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.vit import ViT


class Explicit(NamedTuple):
    """What forward_explicit gives; gradients of the logits reach every tensor of it."""

    logits: Tensor  # (B, num_classes)
    attention: list[Tensor]  # of each block, (B, H, T, T)
    pool: Tensor | None  # of the attention that pools, where the model has one: (B, H, 1, T)


def forward_explicit(model: ViT, pixels: Tensor) -> Explicit:
    """(B, C, H, W) -> the logits of forward, and the probabilities that made them.

    Raises ConfigError where the model has no head.
    """
    check_head(model)
    x = model.norm_pre(model.patch_embed(pixels))
    found: list[Tensor] = []
    block: Any
    for block, attn_pos in zip(model.blocks, model.attn_positions(pixels), strict=False):
        y = block.norm1(x)
        probabilities = require_grad(block.attn.probabilities(y, None, attn_pos))
        found.append(probabilities)
        x = x + block.residual(block.attn.apply_probs(probabilities, y), block.ls1, 1)
        x = x + block.residual(block.mlp(block.norm2(x)), block.ls2, 3)
    if model.config.final_norm == "tokens":
        x = model.norm(x)
    pool = model.attn_pool
    if model.config.pool != "map" or pool is None:
        return Explicit(model.forward_head(x), found, None)
    asked = require_grad(pool.probabilities(x))
    vector = pool.residual_mlp(pool.apply_probs(asked, x))
    vector = model.norm(vector) if model.config.final_norm == "pooled" else vector
    return Explicit(model.head(model.projection(vector)), found, asked)


def check_head(model: ViT) -> None:
    """Raises ConfigError for a model that knows no classes."""
    if not model.num_classes:
        raise ConfigError(
            "this model has no head, so no class to explain: use rollout, heads, pca, similarity "
            "or mask, or a classifier"
        )


def require_grad(x: Tensor) -> Tensor:
    """The tensor, with a gradient of its own where nothing before it wants one."""
    return x if x.requires_grad else x.requires_grad_(torch.is_grad_enabled())


def class_scores(logits: Tensor, target: int | list[int] | Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, num_classes) and a class, one for all images or one each; None: each one's own best ->
    the classes (B,) and their logits (B,). Raises ConfigError for classes that are not there."""
    if target is None:
        chosen = logits.detach().argmax(dim=1)
    else:
        chosen = expand_target(target, *logits.shape).to(logits.device)
    return chosen, logits.gather(1, chosen[:, None])[:, 0]


def expand_target(target: int | list[int] | Tensor, batch: int, classes: int) -> Tensor:
    """A class for all images, or one each -> one each (B,). Raises ConfigError for others."""
    try:
        chosen = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"target={target!r}: expected the number of a class, or one for each image; "
            "class_named() finds it by its label"
        ) from error
    if chosen.dtype.is_floating_point or chosen.dim() > 1 or chosen.numel() not in (1, batch):
        raise ConfigError(f"target={target!r}: expected a class, or one for each image")
    chosen = chosen.long().expand(batch) if chosen.numel() == 1 else chosen.long()
    if not bool(((chosen >= 0) & (chosen < classes)).all()):
        raise ConfigError(f"target={target!r}: expected classes in 0..{classes - 1}")
    return chosen
