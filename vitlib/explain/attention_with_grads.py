"""Logits from stored attention probabilities, so that gradients reach them.

`ViT.forward` runs fused attention, which never stores probabilities, and a gradient needs them as
tensors of its graph: vitlib/points/forward.py keeps them. Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.points.forward import Points, forward_with_points
from vitlib.points.names import list_points
from vitlib.vit import ViT


class Explicit(NamedTuple):
    """Logits, and the probabilities in their graph.

    Attributes:
        logits: (B, num_classes).
        attention: Probabilities of each block, (B, H, T, T).
        pool: Probabilities of the attention that pools, (B, H, 1, T); None for other pools.
    """

    logits: Tensor
    attention: list[Tensor]
    pool: Tensor | None


def forward_explicit(model: ViT, pixels: Tensor) -> Explicit:
    """Compute logits from stored attention probabilities.

    Args:
        model: A ViT with a head.
        pixels: Normalised pixels, (B, C, H, W).

    Returns:
        The logits of `ViT.forward`, and the probabilities that they depend on.

    Raises:
        ConfigError: The model has no head, or a block that is not vitlib's own.
        ImageError: The images cannot be cut into patches.
    """
    check_head(model)
    points, available = (
        [f"blocks.{i}.attn.probs" for i in range(len(model.blocks))],
        list_points(model),
    )
    missing = [name for name in points if name not in available]
    if missing:
        raise ConfigError(
            f"{missing[0].removesuffix('.probs')} is not vitlib's own and has no probabilities: "
            "use the methods gradient, pca or similarity"
        )
    pool = ["pool.probs"] if "pool.probs" in available else []
    at = Points([*points, *pool], dict.fromkeys([*points, *pool], require_grad))
    logits = forward_with_points(model, pixels, at)
    attention = [at.values[name] for name in points]
    return Explicit(logits, attention, at.values[pool[0]] if pool else None)


def check_head(model: ViT) -> None:
    """Check that a model has a head.

    Args:
        model: Any ViT.

    Raises:
        ConfigError: It has no head, so there is no class to explain.
    """
    if not model.num_classes:
        raise ConfigError(
            "this model has no head, so no class to explain: use rollout, heads, pca, similarity "
            "or mask, or a classifier"
        )


def require_grad(x: Tensor) -> Tensor:
    """Make a tensor part of the graph, even where all that it depends on is frozen.

    Args:
        x: Any tensor.

    Returns:
        The same tensor; it requires a gradient where gradients are enabled.
    """
    return x if x.requires_grad else x.requires_grad_(torch.is_grad_enabled())


def class_scores(logits: Tensor, target: int | list[int] | Tensor | None) -> tuple[Tensor, Tensor]:
    """Select the logit of a class for each image.

    Args:
        logits: (B, num_classes).
        target: A class for all images, or one for each; None means the best class of each.

    Returns:
        The classes, (B,), and their logits, (B,).

    Raises:
        ConfigError: A class is out of range.
    """
    if target is None:
        classes = logits.detach().argmax(dim=1)
    else:
        classes = expand_target(target, *logits.shape).to(logits.device)
    return classes, logits.gather(1, classes[:, None])[:, 0]


def expand_target(target: int | list[int] | Tensor, batch: int, num_classes: int) -> Tensor:
    """Expand a target to a class for each image.

    Args:
        target: A class for all images, or one for each.
        batch: Number of images, B.
        num_classes: Number of classes.

    Returns:
        Classes, (B,) int64.

    Raises:
        ConfigError: The target is no class, or there are more or fewer than images.
    """
    try:
        classes = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"target={target!r}: expected the number of a class, or one for each image; "
            "class_named() finds it by its label"
        ) from error
    if classes.dtype.is_floating_point or classes.dim() > 1 or classes.numel() not in (1, batch):
        raise ConfigError(f"target={target!r}: expected a class, or one for each image")
    classes = classes.long().expand(batch) if classes.numel() == 1 else classes.long()
    if not bool(((classes >= 0) & (classes < num_classes)).all()):
        raise ConfigError(f"target={target!r}: expected classes in 0..{num_classes - 1}")
    return classes
