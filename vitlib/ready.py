"""Ready: an optimized model as it is now, image by image and batch by batch.

What Predictor computes with, and what a server or a batch job takes in its place, which make their
batches themselves: images are read by any thread, stacked, and answered.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitlib.fast import FastViT
from vitlib.images import ImageLike
from vitlib.preprocess import ImageProcessor
from vitlib.vit import ViT


@dataclass(frozen=True)
class Ready:
    """A model that runs, its preprocessing, and how its logits become scores."""

    model: ViT | FastViT
    image_processor: ImageProcessor
    multi_label: bool

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        fast = self.model
        return fast.device if isinstance(fast, FastViT) else fast.norm.weight.device

    def read(self, image: ImageLike) -> Tensor:
        """One image -> (C, H, W), what scores() and vectors() take: levels (uint8) where the model
        does the rest, else normalised pixels. On the CPU, by any thread. Raises ImageError."""
        fast = self.model
        takes_levels = isinstance(fast, FastViT) and fast.on_levels is not None
        rule = self.image_processor
        return rule.ready(image) if takes_levels else rule.pixels(image)

    def scores(self, images: Tensor) -> Tensor:
        """(B, C, H, W) of read() -> (B, num_classes) float32 in 0..1 on the CPU: softmax, or
        sigmoid if multi_label."""
        rows = self._rows("forward", images)
        return (rows.sigmoid() if self.multi_label else rows.softmax(dim=-1)).cpu()

    def vectors(self, images: Tensor) -> Tensor:
        """(B, C, H, W) of read() -> what the head reads, (B, D) float32 on the CPU."""
        return self._rows("embed", images).cpu()

    def _rows(self, what: str, images: Tensor) -> Tensor:
        fast = self.model
        with torch.inference_mode():
            if images.dtype == torch.uint8:
                assert isinstance(fast, FastViT)
                rows = (fast.forward_levels if what == "forward" else fast.embed_levels)(images)
            else:
                if not isinstance(fast, FastViT):  # which takes them from anywhere
                    images = images.to(self.device)
                rows = fast(images) if what == "forward" else fast.embed(images)
            return rows.float()
