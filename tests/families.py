"""A tiny model of random weights for each family, with every part that the family has."""

from __future__ import annotations

from typing import Any

import torch

from vitlib import ViT, ViTConfig

_BEIT: dict[str, Any] = {
    "absolute_position": False,
    "key_bias": False,
    "layer_scale": 0.1,
    "pool": "mean",
    "final_norm": "pooled",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit_pooler": {"pooler_dim": 32, "pool": "pooler"},
    "deit_distilled": {"family": "deit", "dist_token": True, "dist_head": True},
    "deit3": {
        "family": "deit3",
        "class_position": False,
        "layer_scale": 0.1,
        "position_resize": "bicubic_antialias",
    },
    "mae_mean": {"family": "mae", "pool": "mean", "final_norm": "pooled"},
    "ijepa": {"family": "ijepa", "class_token": False, "pool": "mean"},
    "dinov2": {
        "family": "dinov2",
        "layer_scale": 1.0,
        "pool": "cls+mean",
        "mask_token": True,
        "position_resize": "bicubic_offset",
    },
    "dinov2_registers": {
        "family": "dinov2_with_registers",
        "layer_scale": 1.0,
        "num_registers": 4,
        "position_resize": "bicubic_antialias",
    },
    "dinov2_swiglu": {
        "family": "dinov2",
        "layer_scale": 1.0,
        "activation": "swiglu",
        "position_resize": "bicubic_fp32",
    },
    "dinov3": {
        "family": "dinov3",
        "layer_scale": 1.0,
        "num_registers": 4,
        "absolute_position": False,
        "rope_theta": 100.0,
        "key_bias": False,
    },
    "clip": {
        "family": "clip",
        "pre_norm": True,
        "patch_bias": False,
        "activation": "quick_gelu",
        "final_norm": "pooled",
        "projection_dim": 16,
    },
    "siglip_map": {
        "family": "siglip",
        "class_token": False,
        "pool": "map",
        "attention_pool": True,
        "activation": "gelu_tanh",
    },
    "beit": {"family": "beit", "relative_position": "block", **_BEIT},
    "beit_timm": {
        "family": "beit",
        "relative_position": "block",
        "relative_resize": "geometric",
        **_BEIT,
    },
    "data2vec": {"family": "data2vec", "relative_position": "shared", **_BEIT},
}


def tiny(name: str, **changes: Any) -> ViT:
    """A model of the family, 32 pixels and patches of 8: (B, 3, 32, 32) -> (B, 5)."""
    sizes = {"image_size": (32, 32), "patch_size": (8, 8), "embed_dim": 32, "depth": 1}
    config = ViTConfig(**{**sizes, "num_heads": 2, "num_classes": 5, **FAMILIES[name], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViT(config).eval()
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():  # no gain, bias or position is trivial
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=numbers), alpha=0.05)
    return model


def pixels(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """(B, 3, H, W), another batch for every count."""
    numbers = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, height, width, generator=numbers)
