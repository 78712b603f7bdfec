"""From a photo to pixels, and from the photos of a plan to the rows of a batch.

Shapes: B photos of a batch, C channels, H W pixels; h w a photo's own sides. Decoded photos are
uint8, or float32 where they are deeper than 8 bits.
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
from vitlib.train.augment import Augment
from vitlib.train.augment_photo import sample_rng
from vitlib.train.loader.cache import ArrayCache
from vitlib.train.mix import mix_photos
from vitlib.train.sampler import BatchPlan

Pixels: TypeAlias = npt.NDArray[np.float32]
Failed: TypeAlias = tuple[tuple[int, str], ...]  # (sample, reason) of each unreadable photo

# Two entries of the cache for each photo: before augmentation, and ready to be normalised.
_RAW, _READY = 0, 1


class PhotoReader:
    """Reads single photos; all state that threads and processes share.

    Attributes:
        cache: Decoded photos; None once the loader is closed.
    """

    def __init__(
        self,
        photos: Sequence[ImageLike],
        processor: ImageProcessor,
        size: tuple[int, int],
        augment: Augment | None,
        seed: int,
        cache: ArrayCache | None,
    ) -> None:
        """Create a reader; nothing is read yet.

        Args:
            photos: Paths, or other images that image/decode.py reads.
            processor: The model's preprocessing.
            size: (height, width) of its pixels.
            augment: Augmentation of training; None for none.
            seed: Seed of the run.
            cache: Two entries for each photo; None for no cache.
        """
        self.photos, self.processor, self.size, self.augment = photos, processor, size, augment
        self.seed, self.cache = seed, cache
        self.warn = WarnOnce()
        self.fill = mean_color(processor)

    def fill_batch(self, plan: BatchPlan, exact: bool, pixels: Pixels) -> tuple[BatchPlan, Failed]:
        """Write the pixels of a plan into a batch.

        Args:
            plan: The photos, and the photos that are mixed into them.
            exact: Without augmentation, as in evaluation.
            pixels: (B, C, H, W), whose first rows are overwritten.

        Returns:
            The plan of these rows, and the photos that could not be read.
        """
        rows = {sample: self.read(plan.epoch, sample, exact) for sample in list_samples(plan)}
        return assemble_batch(plan, rows, pixels)

    def read(self, epoch: int, sample: int, exact: bool) -> Pixels | str:
        """Read a photo.

        Args:
            epoch: Epoch, from which augmentation is drawn.
            sample: Index of the photo.
            exact: Without augmentation.

        Returns:
            Pixels (C, H, W), or the reason why the photo cannot be read.
        """
        try:
            if exact or self.augment is None:
                return self._read_exact(sample)
            rng = sample_rng(self.seed, epoch, sample)
            return self._read_augmented(self.augment, rng, sample)
        except ImageError as error:
            return str(error)

    def _read_augmented(self, augment: Augment, rng: np.random.Generator, sample: int) -> Pixels:
        """Read, augment, normalise and erase."""
        if augment.changes_photo:
            load = self._load_shrunk if augment.crop_scale is not None else self._load_resized
            photo = augment.apply(
                self._load_cached(sample, _RAW, load),
                self.size,
                rng,
                resample=self.processor.resample,
                fill=self.fill,
            )
            pixels = self._normalize(photo)
        else:
            pixels = self._read_exact(sample)
        augment.erase(pixels, rng)
        return pixels

    def _read_exact(self, sample: int) -> Pixels:
        """Return the processor's own pixels in memory that the caller may overwrite."""
        ready = self._load_cached(sample, _READY, self._load_ready)
        return self._normalize(ready) if ready.dtype == np.uint8 else ready.copy()

    def _normalize(self, photo: npt.NDArray[Any]) -> Pixels:
        """(H, W, C) -> (C, H, W), to the bit as the processor normalises."""
        rule = self.processor
        return normalize_image(photo, rule.rescale_factor, rule.image_mean, rule.image_std)

    def _load_cached(
        self, sample: int, kind: int, load: Callable[[ImageLike], npt.NDArray[Any]]
    ) -> npt.NDArray[Any]:
        """Return an entry of the cache, loaded if it is absent."""
        cache = self.cache
        array = None if cache is None else cache.get(2 * sample + kind)
        if array is None:
            array = load(self.photos[sample])
            if cache is not None:
                cache.put(2 * sample + kind, array)
        return array

    def _load_shrunk(self, photo: ImageLike) -> npt.NDArray[Any]:
        """Decode a whole photo (h, w, C), shrunk to at most 3 times the shorter side of pixels."""
        planes = self.processor.decode_planes(photo, self.warn)
        # A whole factor that leaves 1.5 to 3 times the side: reduce() is fast, and a crop of half
        # the area still has more detail than the pixels can show.
        factor = round(min(planes[0].size) / (2 * min(self.size)))
        if factor > 1:
            planes = [plane.reduce(factor) for plane in planes]
        return np.concatenate([np.atleast_3d(np.asarray(p)) for p in planes], axis=2)

    def _load_resized(self, photo: ImageLike) -> npt.NDArray[Any]:
        """Decode, resize and crop a photo by the processor's rule, (H, W, C), without torch.

        The result stays uint8 even for a processor that resizes in float32.
        """
        return self.processor.resize_crop(photo, self.warn)

    def _load_ready(self, photo: ImageLike) -> npt.NDArray[Any]:
        """Decode, resize and crop: uint8 (H, W, C) if only normalisation is left, else pixels."""
        ready = self.processor.to_uint8_or_float(photo, self.warn)
        if ready.dtype == torch.uint8:
            ready = ready.permute(1, 2, 0)
        array: npt.NDArray[Any] = ready.numpy()
        return array


def list_samples(plan: BatchPlan) -> list[int]:
    """List the photos that a plan reads, each once.

    Args:
        plan: A plan.

    Returns:
        Its samples, and the partners that are mixed into them.
    """
    partners = (
        partner for partner, weight in zip(plan.partners, plan.weights, strict=True) if weight < 1
    )
    return list(dict.fromkeys((*plan.samples, *partners)))


def assemble_batch(
    plan: BatchPlan, rows: Mapping[int, Pixels | str], pixels: Pixels
) -> tuple[BatchPlan, Failed]:
    """Mix the photos of a plan and write them into a batch.

    A sample that could not be read is left out. A sample whose partner could not be read stays
    unmixed.

    Args:
        plan: The plan.
        rows: Pixels (C, H, W) of each photo, or the reason why it could not be read.
        pixels: (B, C, H, W), whose first rows are overwritten.

    Returns:
        The plan of these rows, and the photos that could not be read.
    """
    failed = tuple((sample, reason) for sample, reason in rows.items() if isinstance(reason, str))
    partners, weights, boxes = list(plan.partners), list(plan.weights), list(plan.boxes)
    positions: list[int] = []
    for position, sample in enumerate(plan.samples):
        row = rows[sample]
        if isinstance(row, str):
            continue
        if plan.partners and plan.weights[position] < 1:
            partner = rows[plan.partners[position]]
            if isinstance(partner, str):
                partners[position], weights[position], boxes[position] = sample, 1.0, None
            else:
                row = mix_photos(row, partner, plan.weights[position], plan.boxes[position])
        pixels[len(positions)] = row
        positions.append(position)
    if not failed:
        return plan, ()
    samples = tuple(plan.samples[position] for position in positions)
    if not plan.partners:
        return replace(plan, samples=samples), failed
    readable = replace(
        plan,
        samples=samples,
        partners=tuple(partners[position] for position in positions),
        weights=tuple(weights[position] for position in positions),
        boxes=tuple(boxes[position] for position in positions),
    )
    return readable, failed


def pixel_size(image_processor: ImageProcessor) -> tuple[int, int]:
    """Return the size of all pixels of a processor.

    Args:
        image_processor: The model's preprocessing.

    Returns:
        (height, width).

    Raises:
        ConfigError: The size depends on the photo.
    """
    size = image_processor.crop_size or image_processor.size
    if size is None:
        raise ConfigError(
            f"the rule ({image_processor.describe()}) gives pixels of many sizes, which make no "
            "batch: use image_processor.with_image_size((height, width))"
        )
    return size


def mean_color(image_processor: ImageProcessor) -> tuple[int, ...] | None:
    """Return the colour that normalisation maps to about 0.

    Args:
        image_processor: The model's preprocessing.

    Returns:
        One value a channel, 0 to 255; None if no mean is subtracted.
    """
    if image_processor.image_mean is None:
        return None
    factor = image_processor.rescale_factor or 1.0
    return tuple(round(min(max(mean / factor, 0), 255)) for mean in image_processor.image_mean)
