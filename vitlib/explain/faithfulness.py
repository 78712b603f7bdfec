"""Whether a map can be trusted: what happens to a class's probability as the image goes away.

How data flows: a map (B, h, w) orders the patches; deletion takes the most important ones out of
the image first, insertion puts them back into a blurred one first; after each step the model is
asked for the class's probability. The area under each curve is the score: a faithful map's falls
fast (deletion, lower is better) and rises fast (insertion, higher is better).
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

BLUR = 11  # pixels, the side and five times the deviation of the blur, of 1806.07421's insertion


class Faithfulness(NamedTuple):
    """Curves of a map, their area and where they were measured."""

    deletion: Array  # (B,), 0..1: lower is better
    insertion: Array  # (B,), 0..1: higher is better
    deletion_curve: Array  # (B, S + 1): probability of the class
    insertion_curve: Array  # (B, S + 1)
    shares: Array  # (S + 1,), 0..1: of the patches taken out, or put back


def faithfulness(
    model: ViT,
    pixels: Tensor,
    importance: Any,
    target: Target = None,
    *,
    steps: int = 28,
    batch_size: int = 16,
) -> Faithfulness:
    """(B, C, H, W), a map of any size (B, h, w) and a class (None: the best) -> its curves.

    A map of another size than the patches' is averaged over each. Patches that a map holds for
    equal go by their place, from the middle outwards.
    """
    with eval_mode(model):
        chosen = resolve_classes(model, pixels, target)
    found = [
        curves(model, pixels, importance, how, chosen, steps=steps, batch_size=batch_size)
        for how in ("deletion", "insertion")
    ]
    (deletion, shares), (insertion, _) = found
    return Faithfulness(
        _area(deletion, shares), _area(insertion, shares), deletion, insertion, shares
    )


def curves(
    model: ViT,
    pixels: Tensor,
    importance: Any,
    how: str,
    target: Target = None,
    *,
    steps: int = 28,
    batch_size: int = 16,
) -> tuple[Array, Array]:
    """One of the two, "deletion" or "insertion": (B, S + 1) and the shares (S + 1,)."""
    (h, w), patch = model.patch_grid(pixels), model.config.patch_size
    weight = to_array(importance, 3, "importance")
    if weight.shape[1:] == pixels.shape[2:]:  # of the pixels: those after the last patch count none
        weight = weight[:, : h * patch[0], : w * patch[1]]
    ranks = _ranks(weight, len(pixels), (h, w))
    if steps < 1 or how not in ("deletion", "insertion"):
        raise ConfigError(f"steps={steps}, how={how!r}: expected 1 or more, deletion or insertion")
    counts = np.round(np.linspace(0, 1, min(steps, h * w) + 1) * h * w).astype(int)
    found = []
    with eval_mode(model), torch.no_grad():
        chosen = resolve_classes(model, pixels, target)
        for image, rank, class_ in zip(pixels, ranks, chosen, strict=True):
            scores = [
                probabilities(model, some)[:, class_]
                for some in torch.split(_steps(image, rank, counts, how, patch), batch_size)
            ]
            found.append(torch.cat(scores).cpu().numpy())
    return np.stack(found).astype(np.float32), (counts / (h * w)).astype(np.float32)


def _ranks(importance: Array, count: int, grid: tuple[int, int]) -> list[npt.NDArray[np.int64]]:
    """Maps (B, ., .) -> for each, every patch's place in its order, (h, w)."""
    weight = torch.from_numpy(importance)
    if len(weight) != count:
        raise ConfigError(f"{len(weight)} maps for {count} images: expected one an image")
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError("a map with numbers that are NaN or infinite: expected finite ones")
    if weight.shape[1:] != grid:
        weight = F.interpolate(weight[:, None], grid, mode="area")[:, 0]
    middle, ranks = _from_middle(*grid), []
    for row in weight.flatten(1).double().numpy():
        order = np.lexsort((middle, -row))  # the last key counts first
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        ranks.append(rank.reshape(grid))
    return ranks


def _steps(image: Tensor, rank: Any, counts: Any, how: str, patch: tuple[int, int]) -> Tensor:
    """(C, H, W), each patch's place in the order (h, w) -> what is left each time (S, C, H, W)."""
    first = torch.as_tensor(rank[None] < counts[:, None, None], device=image.device)
    first = first.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, None]
    rest = [n - m for n, m in zip(image.shape[1:], first.shape[2:], strict=True)]
    first = F.pad(first, (0, rest[1], 0, rest[0]))  # after the last whole patch: read by no model
    if how == "deletion":
        return torch.where(first, torch.zeros_like(image), image)  # 0 is the mean colour
    return torch.where(first, image, blur(image))


def blur(image: Tensor) -> Tensor:
    """(C, H, W) -> the same without what tells objects apart: a wide Gaussian."""
    reach = 2 * BLUR
    places = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    line = torch.exp(-0.5 * (places / BLUR) ** 2)
    line = line / line.sum()
    for axis in (1, 2):
        moved = image.movedim(axis, -1)
        # Edges repeat; an image may be smaller than the blur.
        padded = torch.cat(
            [moved[..., :1].expand(*moved.shape[:-1], reach), moved,
             moved[..., -1:].expand(*moved.shape[:-1], reach)], dim=-1,
        )  # fmt: skip
        flat = padded.reshape(-1, 1, padded.shape[-1])
        image = F.conv1d(flat, line[None, None]).reshape(moved.shape).movedim(-1, axis)
    return image


def _from_middle(h: int, w: int) -> Array:
    """Each patch's distance from the middle, row by row (N,)."""
    y, x = np.mgrid[:h, :w]
    return (((y - (h - 1) / 2) / h) ** 2 + ((x - (w - 1) / 2) / w) ** 2).ravel()  # type: ignore[no-any-return]


def _area(curve: Array, shares: Array) -> Array:
    """(B, S + 1) and where -> the area under each, as a share (B,): trapezes."""
    found: Array = (((curve[:, 1:] + curve[:, :-1]) / 2) * np.diff(shares)).sum(axis=1)
    return found
