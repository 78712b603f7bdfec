"""MixUp and CutMix: which photos of a step are mixed, and by how much.

The pairs are drawn for the whole batch of a step, from (seed, step) alone. So processes that train
on parts of the batch draw the same pairs, and each takes its part.

Shapes: B photos of a step's batch over all processes, C channels or classes, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vitlib.train.augment import Augment

Box: TypeAlias = tuple[int, int, int, int]  # top, left, bottom, right

_STREAM = 1  # keeps draws for a step apart from draws for a sample: see sample_rng


class MixPairs(NamedTuple):
    """The partner of each photo of a batch; three empty tuples if nothing is mixed.

    Attributes:
        partners: Position of each photo's partner in the batch; its own if it stays unmixed.
        weights: Weight of each photo in the mixture, 0 to 1; the partner has the rest.
        boxes: Pixels that CutMix takes from the partner; None for MixUp.
    """

    partners: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    boxes: tuple[Box | None, ...] = ()


def draw_pairs(
    augment: Augment, seed: int, step: int, count: int, size: tuple[int, int]
) -> MixPairs:
    """Draw the pairs of a step.

    The photos form a random ring in which each has the next as its partner. So no photo is its own
    partner.

    Args:
        augment: Settings of MixUp and CutMix.
        seed: Seed of the run.
        step: Step, from 0.
        count: Photos of the step, B.
        size: (height, width) of each photo in pixels.

    Returns:
        B pairs, or none if mixing is off.
    """
    if not augment.mixes:
        return MixPairs()
    sequence = np.random.SeedSequence((seed, step), spawn_key=(_STREAM,))
    rng = np.random.Generator(np.random.PCG64(sequence))
    ring = rng.permutation(count)
    partners = list(range(count))
    weights, boxes = [1.0] * count, [None] * count  # type: tuple[list[float], list[Box | None]]
    for index, partner in zip(ring.tolist(), np.roll(ring, -1).tolist(), strict=True):
        if index == partner or rng.random() >= augment.mix_prob:
            continue
        weight, box = _draw_pair(augment, size, rng)
        if weight < 1:
            partners[index], weights[index], boxes[index] = partner, weight, box
    return MixPairs(tuple(partners), tuple(weights), tuple(boxes))


def _draw_pair(
    augment: Augment, size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, Box | None]:
    """Draw the weight and the box of one pair."""
    switch = augment.mix_switch_prob if augment.mixup_alpha > 0 else 1.0
    if augment.cutmix_alpha > 0 and rng.random() < switch:
        beta = float(rng.beta(augment.cutmix_alpha, augment.cutmix_alpha))
        box = draw_cutmix_box(beta, size, rng)
        # The edges of the photo cut the box off, so the weight is counted in whole pixels.
        num_pixels, total = (box[2] - box[0]) * (box[3] - box[1]), size[0] * size[1]
        return (total - num_pixels) / total, box
    return float(rng.beta(augment.mixup_alpha, augment.mixup_alpha)), None


def draw_cutmix_box(weight: float, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """Draw CutMix's box (1905.04899, equation 2).

    The box has the photo's shape and 1 - weight of its area. Its centre is anywhere in the photo,
    whose edges cut it off.

    Args:
        weight: Weight of the photo itself, 0 to 1.
        size: (height, width) of the photo in pixels.
        rng: Source of the draws.

    Returns:
        The box in pixels.
    """
    height, width = size
    side = math.sqrt(1 - weight)
    down, across = int(height * side), int(width * side)
    top = int(rng.integers(height)) - down // 2
    left = int(rng.integers(width)) - across // 2
    return max(top, 0), max(left, 0), min(top + down, height), min(left + across, width)


def mix_photos(
    photo: npt.NDArray[np.float32],
    partner: npt.NDArray[np.float32],
    weight: float,
    box: Box | None,
) -> npt.NDArray[np.float32]:
    """Mix two photos: MixUp's weighted sum, or CutMix's box of the partner's pixels.

    Args:
        photo: (C, H, W).
        partner: (C, H, W).
        weight: Weight of the photo, 0 to 1. At 1 the result is the photo itself.
        box: Pixels that the partner fills; None for MixUp.

    Returns:
        (C, H, W).
    """
    if weight == 1:
        return photo
    if box is None:
        weight32 = np.float32(weight)
        blend: npt.NDArray[np.float32] = photo * weight32 + partner * (np.float32(1) - weight32)
        return blend
    top, left, bottom, right = box
    cut = photo.copy()
    cut[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return cut


def mix_targets(
    targets: torch.Tensor, partners: torch.Tensor, weights: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """Mix the targets of mixed photos.

    A target that is unknown (NaN) for either photo is unknown for the mixture, unless that photo
    has a weight of 0.

    Args:
        targets: (B, C) of the photos.
        partners: (B, C) of their partners.
        weights: (B,), weight of each photo.

    Returns:
        (B, C).
    """
    weight = torch.as_tensor(weights, dtype=targets.dtype, device=targets.device)[:, None]
    blend = weight * targets + (1 - weight) * partners
    return torch.where(weight == 1, targets, torch.where(weight == 0, partners, blend))
