"""Negative controls of test_parity.py: a damaged model is not equal to its reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vitlib
from fixtures import references
from fixtures.parity import FAMILIES, TINY, compare
from vitlib.vit import ViT


def test_different_images_give_different_logits() -> None:
    for name in references.MODELS:
        model = references.build(name)
        tokens = references.run_reference(model, references.make_pixels(model)).tokens
        assert references.distance(tokens[0], tokens[1]) > 0.1, name


def _swap_q_and_k(model: ViT) -> None:
    attention = model.blocks[1].attn
    attention.q.weight, attention.k.weight = attention.k.weight, attention.q.weight


def _flip_a_bias(model: ViT) -> None:
    model.blocks[2].mlp.fc1.bias.neg_()


def _wrong_eps(model: ViT) -> None:
    model.blocks[0].norm1.eps = 1e-2


def _other_gelu(model: ViT) -> None:
    wrong = "gelu" if model.config.activation == "gelu_tanh" else "gelu_tanh"
    model.blocks[0].mlp.activation = wrong


def _shift_the_positions(model: ViT) -> None:
    table = model.patch_embed.pos_embed
    table[:, 1:] = table[:, 1:].roll(1, dims=1)


def _drop_a_position(model: ViT) -> None:
    model.patch_embed.pos_embed[:, 3] = 0


def _other_rotation(model: ViT) -> None:
    rope = model.attn_position.rope
    model.attn_position.rope = replace(rope, theta=0.9 * rope.theta)


def _other_class_angles(model: ViT) -> None:
    model.attn_position.cls_angles[0, 1] += 0.1


def _other_offset(model: ViT) -> None:
    model.attn_position.tables[0][5] = 0


def _other_probe(model: ViT) -> None:
    model.attn_pool.probe[0, 0, 0] += 0.1


def _other_norm_of_keys(model: ViT) -> None:
    model.blocks[1].attn.k_norm.weight[0] += 0.1


def _swap_shared_keys(model: ViT) -> None:
    """Exchange the keys of heads 1 and 2, which are of two groups."""
    weight = model.blocks[1].attn.k.weight.view(4, 12, 48)
    weight[1:3] = weight[1:3].flip(0)


BREAK = [_swap_q_and_k, _flip_a_bias, _wrong_eps, _other_gelu]
POSITIONS = [_shift_the_positions, _drop_a_position]
AIMV2 = ("aimv2", "aimv2 native")  # without biases
DAMAGE = [
    (name, damage)
    for name in FAMILIES
    for damage in [
        *(
            d
            for d in BREAK
            if d is not _other_gelu or not name.endswith(("swiglu", "gated", "sapiens2", *AIMV2))
            if d is not _flip_a_bias or name not in AIMV2
        ),
        *(
            [_other_rotation]
            if name.startswith(("dinov3", "sapiens2"))
            else [_other_rotation, _other_class_angles]
            if name == "mlcd"
            else [_other_offset]
            if name.startswith("beit")
            else POSITIONS
        ),
    ]
]


DAMAGE += [("aimv2", _other_probe), ("aimv2 native", _other_probe)]
DAMAGE += [("sapiens2", _other_norm_of_keys), ("sapiens2", _swap_shared_keys)]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_parity_detects_damage(name: str, damage: object, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images = references.make_pixels(reference)
    model = vitlib.load(tmp_path)
    assert compare(model, reference, images) < TINY
    with torch.no_grad():
        damage(model)
    # tanh GELU is within 5e-4 of erf GELU, and is seen all the same: 10 times the tolerance.
    assert compare(model, reference, images) > 10 * TINY


@pytest.mark.parametrize(
    "name",
    [
        "vit",
        "mae",
        "msn",
        "ijepa",
        "clip",
        "siglip",
        "beit absolute",
        "dinov2",
        "registers",
        "radio",
        "tipsv2",
    ],
)
def test_parity_detects_wrong_resize_rule(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images = references.make_pixels(reference, size=(40, 24))
    model = vitlib.load(tmp_path)
    right = model.patch_embed.position_resize
    model.patch_embed.position_resize = (
        "bicubic" if right == "bicubic_antialias" else "bicubic_antialias"
    )
    assert compare(model, reference, images) > 10 * TINY
