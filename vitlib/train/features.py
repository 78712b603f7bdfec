"""What the head reads of each photo, computed once where it never changes."""

from __future__ import annotations

import torch
from torch import Tensor

from vitlib.train.order import Plan
from vitlib.train.reader import Reader
from vitlib.vit import ViT

SIZE = 32  # photos at a time


class Features:
    """The head's input of every photo of a set, filled on first use; of the whole set, in every
    process: a process then trains on its rows."""

    def __init__(self, model: ViT, reader: Reader) -> None:
        self.model, self.reader = model, reader
        self.rows: Tensor | None = None

    def of(self, plan: Plan) -> Tensor:
        """(B, D); of distilled models (B, 2, D)."""
        if self.rows is None:
            self.rows = self._computed()
        return self.rows[list(plan.samples)]

    def _computed(self) -> Tensor:
        model = self.model
        model.eval()
        device, found = model.norm.weight.device, []
        with torch.no_grad():
            for batch in self.reader.evaluation_batches(SIZE):
                found.append(head_input(model, batch.pixels.to(device)))
        model.train()
        return torch.cat(found)


def head_input(model: ViT, pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> what head_output takes."""
    if model.head_dist is not None:
        return model.forward_features(pixels)[:, :2]
    return model.embed(pixels)


def head_output(model: ViT, rows: Tensor) -> Tensor:
    """What head_input gives -> logits (B, num_classes)."""
    if model.head_dist is not None:
        return model.forward_head(rows)
    return model.head(rows)  # type: ignore[no-any-return]
