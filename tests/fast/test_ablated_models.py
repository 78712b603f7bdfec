"""Test ablated models: stock modules in places where vitlib puts other ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import vitlib
from fixtures.fast_models import (
    TOLERANCE,
    max_distance,
    pixels,
    tiny,
)
from vitlib import ViT
from vitlib.fast import FastViT


def use_block_twice(model: ViT) -> None:
    model.blocks[1] = model.blocks[0]


def remove_mlp(model: ViT) -> None:
    model.blocks[1].mlp = nn.Identity()


def replace_mlp_by_linear(model: ViT) -> None:
    model.blocks[1].mlp = nn.Linear(48, 48)


def remove_norm(model: ViT) -> None:
    model.blocks[1].norm1 = nn.Identity()


def remove_norm_bias(model: ViT) -> None:
    model.blocks[1].norm1 = nn.LayerNorm(48, bias=False)


def remove_norm_weights(model: ViT) -> None:
    model.blocks[2].norm2 = nn.LayerNorm(48, elementwise_affine=False)


def remove_final_norm_weights(model: ViT) -> None:
    model.norm = nn.LayerNorm(48, elementwise_affine=False)


def remove_final_norm(model: ViT) -> None:
    model.norm = nn.Identity()


def remove_value_projection(model: ViT) -> None:
    model.blocks[0].attn.v = nn.Identity()


def overlap_patches(model: ViT) -> None:
    model.patch_embed.proj = nn.Conv2d(3, 48, 12, 8, padding=2)


def group_patch_channels(model: ViT) -> None:
    model.patch_embed.proj = nn.Conv2d(3, 48, 8, 8, groups=3)


def reduce_heads(model: ViT) -> None:
    attention = model.blocks[1].attn
    attention.num_heads = 2
    for name in "qkv":
        setattr(attention, name, nn.Linear(48, 24))
    attention.proj = nn.Linear(24, 48)


def reduce_heads_at_the_end(model: ViT) -> None:
    model.blocks[1], model.blocks[2] = model.blocks[2], model.blocks[1]
    attention = model.blocks[2].attn
    attention.num_heads = 2
    for name in "qkv":
        setattr(attention, name, nn.Linear(48, 24))
    attention.proj = nn.Linear(24, 48)


def reduce_blocks(model: ViT) -> None:
    model.blocks = model.blocks[:2]


def narrow_mlp(model: ViT) -> None:
    model.blocks[1].mlp.fc1, model.blocks[1].mlp.fc2 = nn.Linear(48, 20), nn.Linear(20, 48)


def tie_weights(model: ViT) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def freeze_embedding(model: ViT) -> None:
    model.patch_embed.requires_grad_(False)


ABLATIONS = [
    use_block_twice,
    remove_mlp,
    replace_mlp_by_linear,
    remove_norm,
    remove_norm_bias,
    remove_norm_weights,
    remove_final_norm_weights,
    remove_final_norm,
    remove_value_projection,
    overlap_patches,
    group_patch_channels,
    reduce_heads,
    reduce_heads_at_the_end,
    reduce_blocks,
    narrow_mlp,
    tie_weights,
    freeze_embedding,
]


@pytest.mark.parametrize(
    "change",
    ABLATIONS,
)
def test_ablated_model_gives_its_own_numbers(change: Callable[[ViT], None]) -> None:
    """An ablation leaves nn's own classes behind; the fast one gives that model's numbers."""
    model = tiny()
    change(model)
    model.eval()
    fast: FastViT = vitlib.optimize(model)
    assert max_distance(fast, model, pixels(model)) <= TOLERANCE
