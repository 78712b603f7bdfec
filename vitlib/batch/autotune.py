"""Batch size of a GPU: the images that fill its passes, fewer where memory is short."""

from __future__ import annotations

import torch

from vitlib.errors import ImageError
from vitlib.fast.micro_batch import halve_until_fits, micro_batch_size
from vitlib.predict.engine import InferenceEngine

LARGEST = 1024
PASSES = 2  # in a batch: the second is copied to the GPU while the first is computed


def best_batch_size(engine: InferenceEngine) -> int:
    """Find the number of images that are computed together.

    One batch of that size is computed, to check that it fits in memory.

    Args:
        engine: the optimized model on a GPU.

    Returns:
        The batch size.

    Raises:
        ImageError: where a single image does not fit.
    """
    cfg, processor = engine.model.config, engine.image_processor
    side = processor.crop_size or cfg.image_size
    image = engine.preprocess(torch.zeros(*side, cfg.in_channels, dtype=torch.uint8, device="cpu"))
    (p, q), (height, width) = cfg.patch_size, image.shape[1:]
    tokens = cfg.num_prefix_tokens + (height // p) * (width // q)
    size = min(PASSES * micro_batch_size(tokens), LARGEST)

    def compute(size: int) -> None:
        engine.vectors(image.expand(size, *image.shape).contiguous())

    return halve_until_fits(compute, size, error=ImageError)[1]
