"""One photo to pixels, and a plan's photos to the rows of a batch: see reader.py.

Shapes: B photos of a batch, C channels, H W pixels; h w a photo's own sides. Levels are 0..255.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from vitlib.errors import ConfigError, ImageError
from vitlib.image.decode import ImageLike
from vitlib.image.depth import WarnOnce
from vitlib.image.pixels import normalize_image
from vitlib.image.processor import ImageProcessor
from vitlib.train.augment import Augment, rng_for
from vitlib.train.loader.cache import ArrayCache
from vitlib.train.mix import mixed
from vitlib.train.sampler import BatchPlan

Pixels: TypeAlias = npt.NDArray[np.float32]
Failed: TypeAlias = tuple[tuple[int, str], ...]  # (sample, why it could not be read)


class PhotoReader:
    """Photos and what each becomes: what threads and processes have in common."""

    def __init__(
        self,
        photos: Sequence[ImageLike],
        processor: ImageProcessor,
        size: tuple[int, int],
        augment: Augment | None,
        seed: int,
        cache: ArrayCache | None,
    ) -> None:
        self.photos, self.processor, self.size, self.augment = photos, processor, size, augment
        self.seed, self.cache = seed, cache
        self.warn = WarnOnce()
        self.fill_level = mean_level(processor)

    def fill(self, plan: BatchPlan, exact: bool, pixels: Pixels) -> tuple[BatchPlan, Failed]:
        """Write a plan's pixels into the rows (B, C, H, W); what was read, and what was not."""
        found = {sample: self.read(plan.epoch, sample, exact) for sample in needed(plan)}
        return assemble(plan, found, pixels)

    def read(self, epoch: int, sample: int, exact: bool) -> Pixels | str:
        """A photo's pixels (C, H, W) in an epoch, or why there are none."""
        try:
            if exact or self.augment is None:
                return self._exact(sample)
            return self._augmented(self.augment, rng_for(self.seed, epoch, sample), sample)
        except ImageError as error:
            return str(error)

    def _augmented(self, augment: Augment, rng: np.random.Generator, sample: int) -> Pixels:
        if augment.changes_levels:
            cropped = augment.crop_scale is not None
            levels = self._kept(sample, 0, self._shrunk if cropped else self._cut)
            levels = augment.apply(
                levels, self.size, rng, resample=self.processor.resample, fill=self.fill_level
            )
            pixels = self._normalised(levels)
        else:
            pixels = self._exact(sample)
        augment.erase(pixels, rng)
        return pixels

    def _exact(self, sample: int) -> Pixels:
        """The processor's own pixels, not shared with anything."""
        ready = self._kept(sample, 1, self._ready)
        return self._normalised(ready) if ready.dtype == np.uint8 else ready.copy()

    def _normalised(self, levels: npt.NDArray[Any]) -> Pixels:
        """(H, W, C) levels -> (C, H, W) pixels, bit for bit as the rule scales them."""
        rule = self.processor
        return normalize_image(levels, rule.rescale_factor, rule.image_mean, rule.image_std)

    def _kept(
        self, sample: int, kind: int, make: Callable[[ImageLike], npt.NDArray[Any]]
    ) -> npt.NDArray[Any]:
        """What `make` makes of a photo, from the cache if it is there."""
        cache = self.cache
        found = None if cache is None else cache.get(2 * sample + kind)
        if found is None:
            found = make(self.photos[sample])
            if cache is not None:
                cache.put(2 * sample + kind, found)
        return found

    def _shrunk(self, photo: ImageLike) -> npt.NDArray[Any]:
        """The whole photo (h, w, C), its shorter side no more than three times the pixels' one."""
        planes = self.processor.decode_planes(photo, self.warn)
        # By whole numbers, to 1.5 to 3 times: fast, and a crop of half the area loses nothing.
        by = round(min(planes[0].size) / (2 * min(self.size)))
        if by > 1:
            planes = [plane.reduce(by) for plane in planes]
        return np.concatenate([np.atleast_3d(np.asarray(p)) for p in planes], axis=2)

    def _cut(self, photo: ImageLike) -> npt.NDArray[Any]:
        """The photo as the rule resizes and crops it, (H, W, C): left as levels, which torch's
        resize of floats is not."""
        return self.processor.resize_crop(photo, self.warn)

    def _ready(self, photo: ImageLike) -> npt.NDArray[Any]:
        """The same as levels where normalising is all that is left, else as pixels (C, H, W)."""
        ready = self.processor.to_uint8_or_float(photo, self.warn)
        if ready.dtype == torch.uint8:
            ready = ready.permute(1, 2, 0)
        found: npt.NDArray[Any] = ready.numpy()
        return found


def needed(plan: BatchPlan) -> list[int]:
    """The photos of a plan, each once: its samples, and what is mixed into them."""
    mixed_in = (
        partner for partner, share in zip(plan.partners, plan.shares, strict=True) if share < 1
    )
    return list(dict.fromkeys((*plan.samples, *mixed_in)))


def assemble(
    plan: BatchPlan, found: Mapping[int, Pixels | str], pixels: Pixels
) -> tuple[BatchPlan, Failed]:
    """Mix what was found of a plan's photos, pixels or why there are none, into the first rows of
    (B, C, H, W); what of the plan they are, and what could not be read."""
    failed = tuple((sample, why) for sample, why in found.items() if isinstance(why, str))
    partners, shares, boxes = list(plan.partners), list(plan.shares), list(plan.boxes)
    rows: list[int] = []
    for place, sample in enumerate(plan.samples):
        row = found[sample]
        if isinstance(row, str):
            continue
        if plan.partners and plan.shares[place] < 1:
            partner = found[plan.partners[place]]
            if isinstance(partner, str):
                partners[place], shares[place], boxes[place] = sample, 1.0, None
            else:
                row = mixed(row, partner, plan.shares[place], plan.boxes[place])
        pixels[len(rows)] = row
        rows.append(place)
    if not failed:
        return plan, ()
    samples = tuple(plan.samples[place] for place in rows)
    if not plan.partners:
        return replace(plan, samples=samples), failed
    read = replace(
        plan,
        samples=samples,
        partners=tuple(partners[place] for place in rows),
        shares=tuple(shares[place] for place in rows),
        boxes=tuple(boxes[place] for place in rows),
    )
    return read, failed


def pixel_size(image_processor: ImageProcessor) -> tuple[int, int]:
    """The (height, width) of all pixels. Raises ConfigError where that is the photo's to say."""
    size = image_processor.crop_size or image_processor.size
    if size is None:
        raise ConfigError(
            f"the rule ({image_processor.describe()}) gives pixels of many sizes, which make no "
            "batch: use image_processor.with_image_size((height, width))"
        )
    return size


def mean_level(image_processor: ImageProcessor) -> tuple[int, ...] | None:
    """The level of each channel that becomes about 0; None where the rule subtracts nothing."""
    if image_processor.image_mean is None:
        return None
    factor = image_processor.rescale_factor or 1.0
    return tuple(round(min(max(mean / factor, 0), 255)) for mean in image_processor.image_mean)
