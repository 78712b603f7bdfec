"""Draw images to calibrate int8 on, for users who give no photos.

An image is a "dead leaves" picture: ellipses and rectangles of many sizes that hide each other,
over noise of the spectrum of natural images. Such pictures have the edges, the flat areas and the
scale invariance of photos (Lee et al., IJCV 2001; Baradad et al. 2106.05963), and so bring out the
activations that photos do. Noise alone does not, nor do ranges from the norms' weights
(docs/performance.md). The generator has a fixed seed, so that a model is always the same.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitlib.config import ViTConfig
from vitlib.image.pixels import Uint8Affine
from vitlib.image.processor import ImageProcessor, uint8_affine

Plane = NDArray[np.float32]

NUM_IMAGES, BATCH_SIZE = 32, 4
NUM_SHAPES = 200
# Of the radius of a shape, as a share of the image's shorter side.
MIN_RADIUS, MAX_RADIUS = 0.02, 0.4
# Photos are further from drawn images than from other photos, so that the error on the drawn ones
# has to be smaller. With 0.03 a clear label of DeiT-tiny was lost, with 0.02 none for any seed.
MAX_EMBEDDING_ERROR = 0.02


def draw_batches(cfg: ViTConfig, processor: object | None) -> tuple[Iterator[Tensor], int]:
    """Draw images as a model takes them.

    Args:
        cfg: The model's config: its image size and channels.
        processor: Its preprocessing, whose crop, mean and std the images have.

    Returns:
        Batches of normalised pixels (B, C, H, W), and the number of images in all.
    """
    channels, size = cfg.in_channels, cfg.image_size
    if isinstance(processor, ImageProcessor):
        # Of the size of photos: DINOv2 has positions for 518 pixels and is given 224.
        size = processor.crop_size or size
        processor = replace(processor, float_resize=False)  # nothing is resized here
    affine = uint8_affine(processor)
    if affine is None or len(affine.factor) != channels:
        affine = Uint8Affine((2 / 255,) * channels, (-1.0,) * channels)  # to -1..1
    return _batches((channels, *size), affine), NUM_IMAGES


def _batches(shape: tuple[int, int, int], affine: Uint8Affine) -> Iterator[Tensor]:
    """Yield batches of images of a shape (C, H, W); only one batch is in memory."""
    generator = np.random.default_rng(0)
    factor, offset = (
        torch.tensor(part, dtype=torch.float32, device="cpu").view(-1, 1, 1) for part in affine
    )
    for start in range(0, NUM_IMAGES, BATCH_SIZE):
        count = min(BATCH_SIZE, NUM_IMAGES - start)
        images = [torch.from_numpy(draw_image(generator, shape)) for _ in range(count)]
        yield torch.stack(images) * 255 * factor + offset


def draw_image(generator: np.random.Generator, shape: tuple[int, int, int]) -> Plane:
    """Draw one image.

    Args:
        generator: The source of its numbers, which are drawn from it in a fixed order.
        shape: (C, H, W).

    Returns:
        Intensities in 0..1, (C, H, W) float32.
    """
    channels, height, width = shape
    image = _draw_background(generator, shape)
    side = min(height, width)
    smallest, largest = max(MIN_RADIUS * side, 1.0), MAX_RADIUS * side
    numbers = generator.random((NUM_SHAPES, 8 + channels), dtype=np.float32)
    for row in numbers:
        # Radii of density r^-3 look the same at every distance.
        spread = 1 / smallest**2 - 1 / max(largest, smallest) ** 2
        radius = 1 / math.sqrt(1 / smallest**2 - float(row[0]) * spread)
        centre = float(row[1]) * height, float(row[2]) * width
        top, left = (max(0, int(c - 1.5 * radius)) for c in centre)
        bottom, right = (int(c + 1.5 * radius) + 1 for c in centre)
        part = image[:, top:bottom, left:right]
        dy = np.arange(top, top + part.shape[1], dtype=np.float32)[:, None] - centre[0]
        dx = np.arange(left, left + part.shape[2], dtype=np.float32) - centre[1]
        cos, sin = math.cos(row[3] * math.pi), math.sin(row[3] * math.pi)
        u = (dx * cos + dy * sin) / radius
        v = (dy * cos - dx * sin) / (radius * (0.4 + 0.6 * float(row[4])))
        inside = u * u + v * v < 1 if row[5] < 0.6 else (abs(u) < 1) & (abs(v) < 1)
        colour = row[6] + (row[8:] - 0.5) * 0.5
        shade = 1 + 0.3 * (float(row[7]) - 0.5) * u
        np.copyto(part, colour[:, None, None] * shade, where=inside)
    np.clip(image, 0, 1, out=image)
    return image


def _draw_background(generator: np.random.Generator, shape: tuple[int, int, int]) -> Plane:
    """Draw noise whose amplitude falls with frequency, as that of photos does, (C, H, W).

    Source: Field, J. Opt. Soc. Am. A 4, 1987.
    """
    _, height, width = shape
    noise = generator.standard_normal(shape, dtype=np.float32)
    noise = 0.4 * noise + 0.6 * noise.sum(axis=0)  # channels of photos are alike
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    spectrum = np.fft.rfft2(noise) / frequency.clip(1 / max(height, width))
    spectrum[:, 0, 0] = 0
    image = np.fft.irfft2(spectrum, s=(height, width))
    contrast, mean = generator.random(2)
    image *= (0.05 + 0.15 * contrast) / max(float(image.std()), 1e-6)
    background: Plane = (image + 0.3 + 0.4 * mean).astype(np.float32)
    return background
