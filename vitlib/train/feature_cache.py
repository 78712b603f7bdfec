"""Cached features for training the head alone: each photo passes through the model once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vitlib.system.progress import progress_bar
from vitlib.train.loader.loader import PhotoLoader
from vitlib.train.sampler import BatchPlan
from vitlib.vit import ViT

BATCH_SIZE = 32


class FeatureCache:
    """The head's input for every photo of a set, computed on first use.

    Each process computes the whole set, because a plan may name any photo in any process.
    """

    def __init__(
        self,
        model: ViT,
        loader: PhotoLoader,
        compute: Callable[[Tensor], Tensor],
        progress: bool = False,
    ) -> None:
        """Create an empty cache.

        Args:
            model: The model, which is put in eval mode while features are computed.
            loader: Reads the photos without augmentation.
            compute: Maps pixels (B, C, H, W) to the head's input, on the model's device.
            progress: Show a progress bar while features are computed.
        """
        self.progress = progress
        self.model, self.loader, self.compute = model, loader, compute
        self.features: dict[int, Tensor] | None = None
        self.errors: dict[int, str] = {}

    def drop_unreadable(self, plan: BatchPlan) -> BatchPlan:
        """Return a plan without photos that cannot be read, which `errors` then names.

        Args:
            plan: A plan without partners.

        Returns:
            The plan of the readable photos.
        """
        if self.features is None:
            self.features = self.compute_all()
        return replace(plan, samples=tuple(n for n in plan.samples if n in self.features))

    def gather(self, plan: BatchPlan) -> Tensor:
        """Gather the features of a plan.

        Args:
            plan: From drop_unreadable.

        Returns:
            (B, D), for distilled models (B, 2, D).
        """
        assert self.features is not None
        # An empty batch of the right shape and dtype.
        if not plan.samples:
            return torch.stack([*self.features.values()][:1])[:0]
        return torch.stack([self.features[sample] for sample in plan.samples])

    def compute_all(self) -> dict[int, Tensor]:
        """Compute the features of all readable photos.

        Returns:
            The head's input by the number of the photo.
        """
        model = self.model
        features: dict[int, Tensor] = {}
        model.eval()
        with torch.no_grad(), progress_bar(len(self.loader), self.progress, "feature") as advance:
            for batch in self.loader.evaluation_batches(BATCH_SIZE):
                advance(len(batch.samples) + len(batch.failed))
                self.errors.update(batch.failed)
                if batch.samples:
                    features.update(zip(batch.samples, self.compute(batch.pixels), strict=True))
        model.train()
        return features


def head_input(model: ViT, pixels: Tensor) -> Tensor:
    """Compute the input of the head.

    Args:
        model: The model.
        pixels: (B, C, H, W).

    Returns:
        (B, D); for distilled models the two tokens that the heads read, (B, 2, D).
    """
    if model.head_dist is not None:
        return model.forward_features(pixels)[:, :2]
    return model.embed(pixels)


def head_output(model: ViT, features: Tensor) -> Tensor:
    """Apply the head.

    Args:
        model: The model.
        features: From head_input.

    Returns:
        Logits (B, num_classes).
    """
    if model.head_dist is not None:
        return model.forward_head(features)
    return model.head(features)
