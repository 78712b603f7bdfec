"""Vectors of a photo: after which block, and how its tokens are pooled.

Shapes: B images, T tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitlib.config import ViTConfig
from vitlib.errors import ConfigError
from vitlib.vit import ViT

Layers = Literal["all", "last"] | Sequence[int]
POOLS = ("cls", "mean", "cls+mean", "map", "embed")
LAST_ONLY = ("map", "embed")  # what reads the tokens of the last layer alone


class Feature(NamedTuple):
    """A vector of a photo.

    Attributes:
        layer: Number of blocks that the tokens pass, 1..depth.
        pool: "cls" is the class token, "mean" the mean of the patch tokens, "cls+mean" both, one
            after the other. Of the last layer also "map", the model's attention pool, and "embed",
            the vector that the model's own head reads.
    """

    layer: int
    pool: str

    def __str__(self) -> str:
        """Name the feature for people, such as "layer 12, cls"."""
        return f"layer {self.layer}, {self.pool}"


def select_features(
    config: ViTConfig, layers: Layers = "last", pools: Sequence[str] = ("embed",)
) -> tuple[Feature, ...]:
    """Name the vectors of some layers and pools.

    Args:
        config: The config of the model.
        layers: "all", "last", or numbers of layers, 1..depth, the last being depth.
        pools: Names of POOLS. "map" and "embed" belong to the last layer alone.

    Returns:
        The features, by layer and then in the order of the pools, each once.

    Raises:
        ConfigError: The model has no such layer or pool, or no layer that a pool belongs to is
            chosen.
    """
    depth = config.depth
    if isinstance(layers, str):
        names = {"all": range(1, depth + 1), "last": range(depth, depth + 1)}
        if layers not in names:
            raise ConfigError(f"layers={layers!r}: expected 'all', 'last' or numbers in 1..{depth}")
        layers = names[layers]
    chosen = tuple(layers)
    wrong = [n for n in chosen if type(n) is not int or not 1 <= n <= depth]
    if wrong or not chosen:
        shown = f"layer {wrong[0]!r}" if wrong else "no layer"
        raise ConfigError(f"{shown}: expected numbers in 1..{depth}, of which {depth} is the last")
    if not pools:
        raise ConfigError(f"no pool: expected one or more of {', '.join(POOLS)}")
    for pool in pools:
        _check_pool(config, pool)
        if pool in LAST_ONLY and depth not in chosen:
            raise ConfigError(
                f"pool {pool!r} reads the last layer: choose layer {depth} too, or another pool"
            )
    pairs = (
        Feature(layer, pool)
        for layer in sorted({*chosen})
        for pool in pools
        if layer == depth or pool not in LAST_ONLY
    )
    return tuple(dict.fromkeys(pairs))


def _check_pool(config: ViTConfig, pool: str) -> None:
    """Raise ConfigError for a pool that the model has not."""
    if pool not in POOLS:
        raise ConfigError(f"pool {pool!r}: expected one of {', '.join(POOLS)}")
    if pool.startswith("cls") and not config.tokens.cls:
        raise ConfigError(f"pool {pool!r}: this model has no class token; choose mean or embed")
    if pool == "map" and config.attention_pool is None:
        raise ConfigError("pool 'map': this model has no attention pool; choose cls, mean or embed")


@dataclass(frozen=True)
class PooledLayers:
    """Function of a model and pixels that computes features in one pass.

    Attributes:
        features: The features, in the order of the result.
    """

    features: tuple[Feature, ...]

    def __call__(self, model: ViT, images: Tensor) -> Tensor:
        """Compute the features of images, one after the other.

        Tokens of every layer pass the model's final norm, as in DINOv2's evaluation (2304.07193).

        Args:
            model: The model.
            images: Pixels (B, C, H, W), as the model takes them.

        Returns:
            (B, W) with W the sum of widths().
        """
        by_layer: dict[int, list[str]] = {}
        for feature in self.features:
            by_layer.setdefault(feature.layer, []).append(feature.pool)
        vectors = {}
        # Pooled at once: tokens of all layers together would take depth times the memory.
        for layer, tokens in enumerate(model.iter_hidden_states(images, max(by_layer))):
            for pool in by_layer.get(layer, ()) if layer else ():
                vectors[Feature(layer, pool)] = _pool_tokens(model, tokens, pool)
        return torch.cat([vectors[feature] for feature in self.features], dim=1)

    def widths(self, config: ViTConfig) -> list[int]:
        """Count the numbers of each feature.

        Args:
            config: The config of the model.
        """
        return [feature_width(config, feature) for feature in self.features]


def feature_width(config: ViTConfig, feature: Feature) -> int:
    """Count the numbers of a feature.

    Args:
        config: The config of the model.
        feature: The feature.
    """
    if feature.pool == "embed":
        return config.num_features
    return config.embed_dim * (2 if feature.pool == "cls+mean" else 1)


def _pool_tokens(model: ViT, tokens: Tensor, pool: str) -> Tensor:
    """Norm and pool the tokens after a block, (B, T, D) -> (B, D) or 2D."""
    cfg = model.config
    if cfg.final_norm == "tokens":
        tokens = model.norm(tokens)
    if pool == "embed":
        vector: Tensor = model.projection(model.pool(tokens))
        return vector
    parts = []
    if pool == "map" and model.attn_pool is not None:
        parts = [model.attn_pool(tokens)]
    if pool in ("cls", "cls+mean"):
        parts.append(tokens[:, 0])
    if pool in ("mean", "cls+mean"):
        parts.append(tokens[:, cfg.num_prefix_tokens :].mean(dim=1))
    if cfg.final_norm == "pooled":
        parts = [model.norm(part) for part in parts]
    return torch.cat(parts, dim=1)
