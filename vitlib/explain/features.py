"""Maps that need no class: features of patches, their components, and the foreground.

Shapes: as in maps.py.
Sources: Caron et al. 2104.14294 (attention of the class token); Oquab et al. 2304.07193 (PCA).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitlib.errors import ConfigError, resolve_block_indices
from vitlib.explain import maps
from vitlib.explain.attribution import eval_mode
from vitlib.explain.maps import Array
from vitlib.vit import ViT


def patch_features(model: ViT, pixels: Tensor, layer: int = -1) -> Array:
    """Compute the features of patches after a block, through the final norm.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        layer: Index of the block, from 0 or negative from the end.

    Returns:
        Features, (B, h, w, D).

    Raises:
        ConfigError: The layer is out of range.
    """
    # Checked here too, so that the message names the argument `layer`.
    resolve_block_indices([layer], len(model.blocks), "layer")
    with eval_mode(model), torch.no_grad():
        features = model.forward_intermediates(pixels, [layer], norm=True, reshape=True)[0]
    return maps.to_array(features, 4, "features").transpose(0, 2, 3, 1)


def patch_pca(model: ViT, pixels: Tensor, components: int = 3, layer: int = -1) -> Array:
    """Compute the first principal components of the patches of all images (2304.07193, figure 1).

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        components: Number of components.
        layer: Index of the block, from 0 or negative from the end.

    Returns:
        Components, (B, h, w, components), each scaled to 0..1.

    Raises:
        ConfigError: The layer is out of range, or there are not so many components.
    """
    features = patch_features(model, pixels, layer)
    b, h, w, d = features.shape
    scores, _ = maps.patch_pca(features.reshape(b, h * w, d), components)
    return scores.reshape(b, h, w, components)


def similarity(
    model: ViT, pixels: Tensor, patch: tuple[int, int] | None = None, layer: int = -1
) -> Array:
    """Compute the cosine similarity of each patch with the class token, or with one patch.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        patch: Row and column of the patch to compare with; None means the class token.
        layer: Index of the block, from 0 or negative from the end.

    Returns:
        Cosines, (B, h, w), -1..1.

    Raises:
        ConfigError: The patch or the layer is out of range, or the model has no class token.
    """
    resolve_block_indices([layer], len(model.blocks), "layer")
    with eval_mode(model), torch.no_grad():
        patches, prefix = model.forward_intermediates(
            pixels, [layer], norm=True, return_prefix_tokens=True
        )[0]
    h, w = model.patch_grid(pixels)
    if patch is not None:
        row, column = patch
        if not (0 <= row < h and 0 <= column < w):
            raise ConfigError(
                f"patch={patch}: expected a row in 0..{h - 1}, a column in 0..{w - 1}"
            )
        query = patches[:, row * w + column, None]
    elif model.config.tokens.cls:
        query = prefix[:, :1]
    else:
        raise ConfigError("this model has no class token: give the patch to compare with")
    return maps.cosine(query, patches).reshape(-1, h, w)


def foreground(
    model: ViT, pixels: Tensor, mass: float = 0.6, layer: int = -1
) -> npt.NDArray[np.bool_]:
    """Segment the foreground of images.

    The first guess is the patches that hold most of the class token's attention (2104.14294). It
    takes the median of the heads, as single patches of DINOv2 attract any amount. Then each patch
    joins one of two sides, by its features. The foreground is the side whose patches have more of
    that attention, on average.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        mass: Share of the attention that the first guess holds, above 0, at most 1.
        layer: Index of the block, from 0 or negative from the end.

    Returns:
        True for each patch of the foreground, (B, h, w).

    Raises:
        ConfigError: The model has no class token, or an option is out of range.
    """
    if not model.config.tokens.cls:
        raise ConfigError(
            "this model has no class token whose attention could tell a foreground: pca and "
            "similarity to a patch need none"
        )
    resolve_block_indices([layer], len(model.blocks), "layer")
    with eval_mode(model), torch.no_grad():
        rows = model.attention(pixels, [layer], rows="prefix")[0][
            :, :, 0, model.num_prefix_tokens :
        ]
    b, h, w, d = (features := patch_features(model, pixels, layer)).shape
    grid = np.median(maps.to_array(rows, 3, "attention"), axis=1).reshape(b, h, w)
    first = maps.top_mass(maps.smooth(grid).reshape(b, h * w), mass)
    masks = [
        maps.orient_groups(maps.split_groups(x, start), attention)
        for x, start, attention in zip(
            features.reshape(b, h * w, d), first, grid.reshape(b, h * w), strict=True
        )
    ]
    return np.stack(masks).reshape(b, h, w)


def head_maps(model: ViT, pixels: Tensor, layers: int | list[int] | None = None) -> Array:
    """Compute the attention of each head from the class token to the patches.

    A model without a class token gives the mean of the patches' rows.

    Args:
        model: A ViT.
        pixels: Normalised pixels, (B, C, H, W).
        layers: Blocks, as `indices` of `ViT.forward_intermediates`; None means all.

    Returns:
        Probabilities, (B, L, heads, h, w).

    Raises:
        ConfigError: A layer is out of range.
        ImageError: The attention does not fit in memory.
    """
    (h, w), first = model.patch_grid(pixels), model.num_prefix_tokens
    rows: Literal["all", "prefix"] = "prefix" if model.config.tokens.cls else "all"
    with eval_mode(model), torch.no_grad():
        layer_maps = model.attention(pixels, layers, rows=rows)
    read = [x[:, :, 0] if rows == "prefix" else x[:, :, first:].mean(dim=2) for x in layer_maps]
    patches = torch.stack(read, dim=1)[..., first:]
    grids = patches.reshape(*patches.shape[:-1], h, w)
    return maps.to_array(grids, 5, "attention")
