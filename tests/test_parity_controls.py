"""Negative controls of test_parity.py: a damaged model is not equal to its reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vitlib
from fixtures import references
from fixtures.parity import FAMILIES, TINY, compare


def test_different_images_give_different_logits() -> None:
    for name in references.MODELS:
        model = references.build(name)
        tokens = references.run_reference(model, references.make_pixels(model)).tokens
        assert references.distance(tokens[0], tokens[1]) > 0.1, name


# Kinds that a family's own code computes, as others are of parts that no output of it reads.
UNREAD = {"other pool"}
RARE_KINDS = {
    "dinov3": {"shifted rotary table", "other rotary base"},
    "mlcd": {"other rotary base", "other class angles"},
    "beit": {"shifted relative bias"},
    "beit shared": {"shifted relative bias"},
    "aimv2": {"other probe"},
    "aimv2 native": {"other probe"},
    "sapiens2": {"other norm of keys", "exchanged heads of keys"},
    "vit": {"flipped bias", "other GELU", "dropped position row", "transposed head"},
    "registers": {"missing LayerScale", "missing final norm"},
    "clip projection": {"missing norm before the blocks"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_parity_detects_damage(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images = references.make_pixels(reference)
    model = vitlib.load(tmp_path)
    assert compare(model, reference, images) < TINY
    broken = dict(vitlib.testing.damage(model, images))
    assert broken.keys() >= {"swapped q and k", "wrong eps"} | RARE_KINDS.get(name, set())
    for kind in broken.keys() - UNREAD:
        # tanh GELU is within 5e-4 of erf GELU, and is noticed all the same: 10 times the tolerance.
        assert compare(broken[kind], reference, images) > 10 * TINY, kind


def test_parity_detects_swapped_shared_keys(tmp_path: Path) -> None:
    """Exchange the keys of heads 1 and 2 of Sapiens2, which are of two groups."""
    reference = references.save_model("sapiens2", tmp_path)
    images, model = references.make_pixels(reference), vitlib.load(tmp_path)
    keys = model.blocks[1].attn.k.weight.detach().view(4, 12, 48)
    assert not torch.equal(keys[1], keys[2])
    broken = dict(vitlib.testing.damage(model, images))["exchanged heads of keys"]
    exchanged = broken.blocks[1].attn.k.weight.detach().view(4, 12, 48)
    assert torch.equal(exchanged[[0, 2, 1, 3]], keys)
    assert compare(broken, reference, images) > 10 * TINY


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
