"""The batch size of a GPU, found by trial: doubled as long as that pays and fits."""

from __future__ import annotations

import time

import torch

from vitlib.ready import Ready

FIRST, LAST = 32, 1024
GAIN = 1.03  # a size twice as large must be faster by this much


def best_batch_size(ready: Ready) -> int:
    """Images that are computed together. Takes some seconds."""
    best, rate = FIRST, 0.0
    size = FIRST
    while size <= LAST:
        try:
            found = _rate(ready, size)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if found < GAIN * rate:
            break
        best, rate, size = size, found, size * 2
    return best


def _rate(ready: Ready, size: int) -> float:
    """Images a second, after one batch that may compile or capture."""
    cfg, rule = ready.model.config, ready.image_processor
    side = rule.crop_size or cfg.image_size
    image = ready.read(torch.zeros(*side, cfg.in_channels, dtype=torch.uint8, device="cpu"))
    batch = image.expand(size, *image.shape).contiguous()
    ready.vectors(batch)
    start, times = time.perf_counter(), 3
    for _ in range(times):
        ready.vectors(batch)
    return size * times / (time.perf_counter() - start)
