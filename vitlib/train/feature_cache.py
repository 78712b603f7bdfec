"""Cached features for training the head alone: each photo passes through the model once.

With a store of features on disk, a photo that any verb has passed through the model does not pass
through it again.

Shapes: N photos, D features.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vitlib.data import LabelledPhotos
from vitlib.features import Feature, FeatureKey, FeatureStore, open_store
from vitlib.features.extraction import hash_photos
from vitlib.image.processor import ImageProcessor
from vitlib.predict.model_digest import hash_model
from vitlib.system.progress import progress_bar
from vitlib.train.loader.loader import PhotoLoader
from vitlib.train.sampler import BatchPlan
from vitlib.vit import ViT

BATCH_SIZE = 32


class StoredFeatures:
    """Features of the photos of a set in a store on disk."""

    def __init__(self, store: FeatureStore, key: FeatureKey, photos: LabelledPhotos) -> None:
        """Name the features of photos.

        Args:
            store: The store.
            key: What makes them.
            photos: The set.
        """
        self.store, self.key = store, key
        self.paths = [photo.path for photo in photos.photos]
        self.digests: list[str] = []

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str] | None,
        model: ViT,
        processor: ImageProcessor,
        precision: str,
        photos: LabelledPhotos,
    ) -> StoredFeatures | None:
        """Open the store that a run may use.

        Args:
            folder: The caller's choice; None takes VITLIB_FEATURES of the environment.
            model: The model, whose head is not read.
            processor: Its preprocessing.
            precision: Precision of the run.
            photos: The training set.

        Returns:
            The features; None without a store, and for a distilled model, whose heads read two
            tokens.
        """
        store = open_store(folder)
        if store is None or model.head_dist is not None:
            return None
        # Arithmetic in float32 is that of an optimized model, but for rounding.
        name = precision if precision == "fp32" else f"{precision}-training"
        digest = hash_model(model, processor, with_head=False)
        return cls(store, FeatureKey(digest, name, Feature(model.config.depth, "embed")), photos)

    def read(self, width: int) -> dict[int, Tensor]:
        """Read the features that the store has.

        Args:
            width: D.

        Returns:
            (D,) by the number of the photo.
        """
        self.digests = [entry.digest for entry in hash_photos(self.paths)]
        rows = self.store.read(self.key, self.digests, width)
        indices = np.flatnonzero(~np.isnan(rows[:, 0])).tolist()
        return {i: torch.from_numpy(rows[i].copy()) for i in indices}

    def write(self, features: dict[int, Tensor]) -> None:
        """Store features.

        Args:
            features: (D,) by the number of the photo.
        """
        if features:
            rows = np.stack([features[i].float().cpu().numpy() for i in features])
            self.store.write(self.key, [self.digests[i] for i in features], rows)


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
        self.stored: StoredFeatures | None = None
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
        model, computed = self.model, dict[int, Tensor]()
        device = next(model.parameters()).device
        stored: dict[int, Tensor] = (
            {} if self.stored is None else self.stored.read(model.num_features)
        )
        rest = [sample for sample in range(len(self.loader)) if sample not in stored]
        model.eval()
        with torch.no_grad(), progress_bar(len(rest), self.progress, "feature") as advance:
            for batch in self.loader.evaluation_batches(BATCH_SIZE, rest) if rest else ():
                advance(len(batch.samples) + len(batch.failed))
                self.errors.update(batch.failed)
                if batch.samples:
                    computed.update(zip(batch.samples, self.compute(batch.pixels), strict=True))
        model.train()
        if self.stored is not None:
            self.stored.write(computed)
        both = computed | {sample: row.to(device) for sample, row in stored.items()}
        return {sample: both[sample] for sample in sorted(both)}


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
