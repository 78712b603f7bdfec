"""Ready: an optimized model as it is now, image by image and batch by batch.

What Predictor computes with, and what a server or a batch job takes in its place, which make their
batches themselves: images are read by any thread, stacked, and answered.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
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
        return self.reading()(image)

    def reading(self) -> Callable[[ImageLike], Tensor]:
        """What read() does, without the model: for other processes."""
        fast = self.model
        takes_levels = isinstance(fast, FastViT) and fast.on_levels is not None
        rule = self.image_processor
        return rule.ready if takes_levels else rule.pixels

    def scores(self, images: Tensor) -> Tensor:
        """(B, C, H, W) of read() -> (B, num_classes) float32 in 0..1 on the CPU: softmax, or
        sigmoid if multi_label."""
        return self._scores(self._rows("forward", images)).cpu()

    def vectors(self, images: Tensor) -> Tensor:
        """(B, C, H, W) of read() -> what the head reads, (B, D) float32 on the CPU."""
        return self._rows("embed", images).cpu()

    def scores_and_vectors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What scores() and vectors() give; on a CPU in one pass."""
        fast = self.model
        trunk = fast.trunk if isinstance(fast, FastViT) else fast
        if self.device.type != "cpu" or trunk.head_dist is not None:  # which reads another token
            return self.scores(images), self.vectors(images)
        vectors = self._rows("embed", images)
        with torch.inference_mode():
            takes = fast.takes if isinstance(fast, FastViT) else trunk.norm.weight.dtype
            logits = trunk.head(vectors.to(takes)).float()
        return self._scores(logits), vectors

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)

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
