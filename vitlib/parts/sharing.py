"""Copies of a model that share its weights."""

from __future__ import annotations

import copy

from torch import nn

from vitlib.vit import ViT


def copy_sharing_weights(model: ViT) -> ViT:
    """Copy the modules of a model, but not its parameters and buffers.

    Args:
        model: The model, which is only read.

    Returns:
        A model with modules of its own, whose parameters and buffers are the very tensors of
        `model`: training one trains both.
    """
    shared: list[nn.Parameter] = list(model.parameters())
    memo = {id(tensor): tensor for tensor in (*shared, *model.buffers())}
    return copy.deepcopy(model, memo)
