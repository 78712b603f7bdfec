"""What the head reads of each photo, computed once where it never changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vitlib.train.loader.loader import PhotoLoader
from vitlib.train.sampler import BatchPlan
from vitlib.vit import ViT

SIZE = 32  # photos at a time


class Features:
    """The head's input of every photo of a set, filled on first use; of the whole set, in every
    process: a process then trains on its rows."""

    def __init__(self, model: ViT, reader: PhotoLoader, read: Callable[[Tensor], Tensor]) -> None:
        """read: head_input of the model, wherever its weights are."""
        self.model, self.reader, self.read = model, reader, read
        self.rows: dict[int, Tensor] | None = None
        self.failed: dict[int, str] = {}

    def readable(self, plan: BatchPlan) -> BatchPlan:
        """The plan less the photos that cannot be read, which `failed` then names."""
        if self.rows is None:
            self.rows = self._computed()
        return replace(plan, samples=tuple(n for n in plan.samples if n in self.rows))

    def of(self, plan: BatchPlan) -> Tensor:
        """(B, D); of distilled models (B, 2, D). The plan is a readable one."""
        assert self.rows is not None
        if not plan.samples:
            return torch.stack([*self.rows.values()][:1])[:0]
        return torch.stack([self.rows[number] for number in plan.samples])

    def _computed(self) -> dict[int, Tensor]:
        model = self.model
        found: dict[int, Tensor] = {}
        model.eval()
        with torch.no_grad():
            for batch in self.reader.evaluation_batches(SIZE):
                self.failed.update(batch.failed)
                if batch.samples:
                    found.update(zip(batch.samples, self.read(batch.pixels), strict=True))
        model.train()
        return found


def head_input(model: ViT, pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> what head_output takes."""
    if model.head_dist is not None:
        return model.forward_features(pixels)[:, :2]
    return model.embed(pixels)


def head_output(model: ViT, rows: Tensor) -> Tensor:
    """What head_input gives -> logits (B, num_classes)."""
    if model.head_dist is not None:
        return model.forward_head(rows)
    return model.head(rows)
