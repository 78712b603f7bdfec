"""Faithfulness of a map: the probability of a class as the image is removed or restored.

How data flows: a map (B, h, w) orders the patches. Deletion removes the most important ones from
the image first; insertion restores them first in a blurred image. After each step the model gives
the probability of the class. The score is the area under each curve: a faithful map's falls fast
(deletion, lower is better) and rises fast (insertion, higher is better).
Source: Petsiuk et al. 1806.07421, section 4.1.

Shapes: B images, C channels, H W pixels, h w patches, S steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.explain.attribution import Target, eval_mode, probabilities, resolve_classes
from vitlib.explain.maps import Array, to_array
from vitlib.vit import ViT

BLUR = 11  # standard deviation of the blur in pixels (1806.07421's insertion)


class Faithfulness(NamedTuple):
    """Deletion and insertion curves of a map, and the area under each.

    Attributes:
        deletion: Area under the deletion curve, (B,), 0..1; lower is better.
        insertion: Area under the insertion curve, (B,), 0..1; higher is better.
        deletion_curve: Probability of the class after each step, (B, S + 1).
        insertion_curve: Probability of the class after each step, (B, S + 1).
        shares: Share of the patches removed or restored, (S + 1,), 0..1.
    """

    deletion: Array
    insertion: Array
    deletion_curve: Array
    insertion_curve: Array
    shares: Array


def faithfulness(
    model: ViT,
    pixels: Tensor,
    importance: Any,
    target: Target = None,
    *,
    steps: int = 28,
    batch_size: int = 16,
) -> Faithfulness:
    """Measure the faithfulness of maps by deletion and insertion.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        importance: Maps of any size, (B, h, w); they are averaged over each patch. Patches of
            equal importance are taken from the middle of the image outwards.
        target: A class for all images, or one for each; None means the best class of each.
        steps: Number of steps, 1 or more; at most the number of patches counts.
        batch_size: Number of images in a forward.

    Returns:
        Curves and their areas.

    Raises:
        ConfigError: The maps do not match the images, or a class or option is out of range.
    """
    with eval_mode(model):
        classes = resolve_classes(model, pixels, target)
    (deletion, shares), (insertion, _) = (
        curves(model, pixels, importance, mode, classes, steps=steps, batch_size=batch_size)
        for mode in ("deletion", "insertion")
    )
    return Faithfulness(
        _area(deletion, shares), _area(insertion, shares), deletion, insertion, shares
    )


def curves(
    model: ViT,
    pixels: Tensor,
    importance: Any,
    mode: str,
    target: Target = None,
    *,
    steps: int = 28,
    batch_size: int = 16,
) -> tuple[Array, Array]:
    """Compute one curve of each map.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        importance: Maps of any size, (B, h, w); they are averaged over each patch. Patches of
            equal importance are taken from the middle of the image outwards.
        mode: "deletion" or "insertion".
        target: A class for all images, or one for each; None means the best class of each.
        steps: Number of steps, 1 or more; at most the number of patches counts.
        batch_size: Number of images in a forward.

    Returns:
        Probabilities, (B, S + 1), and the shares of the patches, (S + 1,).

    Raises:
        ConfigError: The maps do not match the images, or a class or option is out of range.
    """
    (h, w), patch = model.patch_grid(pixels), model.config.patch_size
    weight = to_array(importance, 3, "importance")
    # The model reads no pixel after the last whole patch.
    if weight.shape[1:] == pixels.shape[2:]:
        weight = weight[:, : h * patch[0], : w * patch[1]]
    ranks = _ranks(weight, len(pixels), (h, w))
    if steps < 1 or mode not in ("deletion", "insertion"):
        raise ConfigError(
            f"steps={steps}, mode={mode!r}: expected 1 or more, deletion or insertion"
        )
    counts = np.round(np.linspace(0, 1, min(steps, h * w) + 1) * h * w).astype(int)
    lines = []
    with eval_mode(model), torch.no_grad():
        classes = resolve_classes(model, pixels, target)
        for image, rank, class_ in zip(pixels, ranks, classes, strict=True):
            scores = [
                probabilities(model, batch)[:, class_]
                for batch in torch.split(_steps(image, rank, counts, mode, patch), batch_size)
            ]
            lines.append(torch.cat(scores).cpu().numpy())
    return np.stack(lines).astype(np.float32), (counts / (h * w)).astype(np.float32)


def _ranks(importance: Array, count: int, grid: tuple[int, int]) -> list[npt.NDArray[np.int64]]:
    """Rank the patches of each map (B, ., .) by importance, most important first, (h, w) each."""
    weight = torch.from_numpy(importance)
    if len(weight) != count:
        raise ConfigError(f"{len(weight)} maps for {count} images: expected one an image")
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError("a map with numbers that are NaN or infinite: expected finite ones")
    if weight.shape[1:] != grid:
        weight = F.interpolate(weight[:, None], grid, mode="area")[:, 0]
    middle, ranks = _from_middle(*grid), []
    for row in weight.flatten(1).double().numpy():
        # Lexsort's last key is its first criterion.
        order = np.lexsort((middle, -row))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        ranks.append(rank.reshape(grid))
    return ranks


def _steps(image: Tensor, rank: Any, counts: Any, mode: str, patch: tuple[int, int]) -> Tensor:
    """Build the image after each step, (C, H, W) and ranks (h, w) -> (S + 1, C, H, W)."""
    first = torch.as_tensor(rank[None] < counts[:, None, None], device=image.device)
    first = first.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, None]
    rest = [n - m for n, m in zip(image.shape[1:], first.shape[2:], strict=True)]
    # The model does not read these pixels.
    first = F.pad(first, (0, rest[1], 0, rest[0]))
    if mode == "deletion":
        return torch.where(first, torch.zeros_like(image), image)  # 0 is the mean colour
    return torch.where(first, image, blur(image))


def blur(image: Tensor) -> Tensor:
    """Blur an image by a Gaussian so wide that objects cannot be recognised.

    Args:
        image: (C, H, W), of any size.

    Returns:
        The blurred image, (C, H, W).
    """
    reach = 2 * BLUR
    offsets = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    line = torch.exp(-0.5 * (offsets / BLUR) ** 2)
    line = line / line.sum()
    for axis in (1, 2):
        moved = image.movedim(axis, -1)
        # Edges repeat. The image may be narrower than the blur reaches.
        padded = torch.cat(
            [moved[..., :1].expand(*moved.shape[:-1], reach), moved,
             moved[..., -1:].expand(*moved.shape[:-1], reach)], dim=-1,
        )  # fmt: skip
        flat = padded.reshape(-1, 1, padded.shape[-1])
        image = F.conv1d(flat, line[None, None]).reshape(moved.shape).movedim(-1, axis)
    return image


def _from_middle(h: int, w: int) -> Array:
    """Compute the squared distance of each patch from the middle, row by row, (N,)."""
    y, x = np.mgrid[:h, :w]
    return np.ravel(((y - (h - 1) / 2) / h) ** 2 + ((x - (w - 1) / 2) / w) ** 2)


def _area(curve: Array, shares: Array) -> Array:
    """Integrate curves (B, S + 1) over the shares by trapezoids, (B,)."""
    area: Array = (((curve[:, 1:] + curve[:, :-1]) / 2) * np.diff(shares)).sum(axis=1)
    return area
