"""Attention probabilities of images, by the model itself.

Shapes: L layers, H heads, T tokens, P prefix tokens, h w patches of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.fast import FastViT
from vitlib.image.depth import WarnOnce
from vitlib.image.prefetch import Images, OnError, map_batches
from vitlib.image.processor import ImageProcessor
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.predict.backends import Model


class AttentionMaps(NamedTuple):
    """Attention probabilities of one image.

    Attributes:
        probabilities: (L, H, T, T), or (L, H, P, T) with rows="prefix"; each row sums to 1.
        grid: (h, w) of the patches, which are the last h * w of the T tokens, row by row.
    """

    probabilities: npt.NDArray[np.float32]
    grid: tuple[int, int]


def attention_maps(
    model: Model,
    image_processor: ImageProcessor,
    images: Images,
    layers: int | Sequence[int] | None,
    rows: Literal["all", "prefix"],
    batch_size: int,
    on_error: OnError,
    progress: bool,
) -> list[AttentionMaps | None]:
    """Compute the attention probabilities of images; Predictor.attention describes the arguments.

    Args:
        model: The model; an optimized one and an exported file have no attention probabilities.
        image_processor: The preprocessing.
        images: Paths, bytes, PIL images or arrays.
        layers: Indices of blocks; None takes all.
        rows: Query tokens, all or the prefix tokens only.
        batch_size: The number of images that are computed together.
        on_error: "raise", "none" or a function.
        progress: True shows a progress bar.

    Returns:
        The maps of each image; None for an image that cannot be read.

    Raises:
        ImageError: An image cannot be read, and on_error is "raise".
        ConfigError: The model is optimized or exported, or an argument is out of range.
    """
    if not isinstance(model, ViT):
        kind = "an optimized model" if isinstance(model, FastViT) else "an exported file"
        raise ConfigError(
            f"attention: expected a ViT, got {kind}, which keeps no attention probabilities: load "
            "the checkpoint it was made from"
        )
    if isinstance(layers, Sequence) and not len(layers):
        raise ConfigError("layers=[]: expected one block or more")
    model.eval()
    device = next(model.parameters()).device

    def run(pixels: Tensor) -> list[AttentionMaps]:
        with torch.inference_mode(), isolate_torch_settings():
            maps = torch.stack(model.attention(pixels.to(device), layers, rows), dim=1)
        return [AttentionMaps(array, model.patch_grid(pixels)) for array in maps.cpu().numpy()]

    read = partial(image_processor.to_float, warn=WarnOnce())
    return list(map_batches(images, read, run, device, batch_size, on_error, progress))
