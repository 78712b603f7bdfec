"""MixUp and CutMix: which photos of a step are mixed, and how.

The pairs are drawn for the whole batch of a step, from (seed, step) alone: processes that each
train on a part of the batch draw the same, and take their part.

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

_STREAM = 1  # sets the numbers of a step apart from those of a sample: see rng_for


class Pairs(NamedTuple):
    """What is mixed into each photo of a batch; three empty tuples where nothing is."""

    partners: tuple[int, ...] = ()  # its place in the batch; its own where nothing is mixed in
    shares: tuple[float, ...] = ()  # how much of itself is left, 0..1
    boxes: tuple[Box | None, ...] = ()  # CutMix: what the partner fills, in pixels; None: MixUp


def draw(augment: Augment, seed: int, step: int, count: int, size: tuple[int, int]) -> Pairs:
    """The pairs of a step's `count` photos of size (height, width), from (seed, step) alone.

    All photos stand in one random ring, each with the next as its partner, so none is its own.
    """
    if not augment.mixes:
        return Pairs()
    sequence = np.random.SeedSequence((seed, step), spawn_key=(_STREAM,))
    rng = np.random.Generator(np.random.PCG64(sequence))
    ring = rng.permutation(count)
    partners = list(range(count))
    shares, boxes = [1.0] * count, [None] * count  # type: tuple[list[float], list[Box | None]]
    for place, partner in zip(ring.tolist(), np.roll(ring, -1).tolist(), strict=True):
        if place == partner or rng.random() >= augment.mix_prob:
            continue
        share, box = _one(augment, size, rng)
        if share < 1:
            partners[place], shares[place], boxes[place] = partner, share, box
    return Pairs(tuple(partners), tuple(shares), tuple(boxes))


def _one(
    augment: Augment, size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, Box | None]:
    """The share and the box of one pair."""
    switch = augment.mix_switch_prob if augment.mixup_alpha > 0 else 1.0
    if augment.cutmix_alpha > 0 and rng.random() < switch:
        box = cut_box(float(rng.beta(augment.cutmix_alpha, augment.cutmix_alpha)), size, rng)
        # What the edges of the photo cut off is not mixed in: the share is that of whole pixels.
        filled, whole = (box[2] - box[0]) * (box[3] - box[1]), size[0] * size[1]
        return (whole - filled) / whole, box
    return float(rng.beta(augment.mixup_alpha, augment.mixup_alpha)), None


def cut_box(share: float, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """CutMix's box (1905.04899, equation 2): of the photo's shape and 1 - share of its area, around
    a point anywhere in it, cut off at its edges."""
    height, width = size
    side = math.sqrt(1 - share)
    down, across = int(height * side), int(width * side)
    top = int(rng.integers(height)) - down // 2
    left = int(rng.integers(width)) - across // 2
    return max(top, 0), max(left, 0), min(top + down, height), min(left + across, width)


def mixed(
    own: npt.NDArray[np.float32],
    partner: npt.NDArray[np.float32],
    share: float,
    box: Box | None,
) -> npt.NDArray[np.float32]:
    """Two photos (C, H, W) as one: MixUp's weighted sum, or with a box the partner's pixels there.

    A share of 1 leaves the photo as it is.
    """
    if share == 1:
        return own
    if box is None:
        kept = np.float32(share)
        summed: npt.NDArray[np.float32] = own * kept + partner * (np.float32(1) - kept)
        return summed
    top, left, bottom, right = box
    pasted = own.copy()
    pasted[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return pasted


def mix_targets(
    targets: torch.Tensor, partners: torch.Tensor, shares: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """The targets (B, C) of mixed photos, from their own and their partners', both (B, C).

    What is unknown (NaN) of either photo is unknown of the mixture, unless none of it is in there.
    """
    share = torch.as_tensor(shares, dtype=targets.dtype, device=targets.device)[:, None]
    summed = share * targets + (1 - share) * partners
    return torch.where(share == 1, targets, torch.where(share == 0, partners, summed))
