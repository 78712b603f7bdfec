"""Broken copies of a model: each gives other logits, and each kind that can be is there."""

from __future__ import annotations

import copy

import pytest
import torch

import vitlib
from fixtures.families import FAMILIES, RARE, pixels, tiny
from vitlib.config import ViTConfig
from vitlib.testing.distance import relative_distance
from vitlib.testing.mistakes import MISTAKES


def possible(cfg: ViTConfig) -> set[str]:
    """Name the kinds of damage that a config allows."""
    kinds = {"swapped q and k", "exchanged heads of keys", "wrong eps", "moved norms"}
    conditions = {
        "flipped bias": cfg.biases.proj,
        "other GELU": cfg.activation != "swiglu",
        "missing LayerScale": cfg.layer_scale is not None,
        "other norm of keys": cfg.norms.qk is not None,
        "dropped position row": cfg.positions.embed,
        "shifted positions": cfg.positions.embed,
        "shifted rotary table": cfg.rope is not None,
        "other rotary base": cfg.rope is not None and not cfg.rope.learned,
        "other class angles": cfg.rope is not None and cfg.rope.class_token,
        "shifted relative bias": cfg.positions.relative is not None,
        "missing norm before the blocks": cfg.pre_norm,
        "missing final norm": cfg.final_norm != "none",
        "other probe": cfg.pool == "map",
        "other pool": cfg.pool in ("cls", "mean") and cfg.tokens.cls and not cfg.tokens.dist,
        "transposed head": cfg.num_classes > 1,
    }
    return kinds | {kind for kind, holds in conditions.items() if holds}


def trained(family: str, depth: int = 3) -> vitlib.ViT:
    """A tiny model with weights as large as training makes them: both GELUs differ then."""
    model = tiny(family, depth=depth, embed_dim=48, num_heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


@pytest.mark.parametrize("family", FAMILIES | RARE)
def test_every_possible_damage_changes_logits(family: str) -> None:
    model, images = trained(family), pixels(2)
    before, state = model(images).detach(), copy.deepcopy(model.state_dict())
    config = model.config
    broken = dict(vitlib.testing.damage(model, images))
    assert broken.keys() <= possible(config)
    # The two forms of GELU differ by up to 5e-4, so that it depends on the weights, which each
    # torch draws in its own way, whether the logits show them.
    assert possible(config) - broken.keys() <= {"other GELU"}
    for name, damaged in broken.items():
        assert relative_distance(damaged(images), before) > 5e-5, name
    # The model itself is as it was.
    assert torch.equal(model(images), before)
    assert model.config is config
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


def test_every_kind_is_of_some_family() -> None:
    configs = [tiny(family).config for family in FAMILIES | RARE]
    assert set().union(*map(possible, configs)) == set(MISTAKES)


def test_damage_that_changes_nothing_is_left_out() -> None:
    model = tiny("vit", depth=2)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias.zero_()
        model.patch_embed.pos_embed.zero_()
    names = {name for name, _ in vitlib.testing.damage(model)}
    assert not names & {"flipped bias", "dropped position row", "shifted positions"}
    assert "swapped q and k" in names


def test_fresh_layer_scale_hides_damage() -> None:
    model = tiny("dinov2", depth=2)
    kinds = {"swapped q and k", "exchanged heads of keys", "missing LayerScale"}
    assert kinds <= {name for name, _ in vitlib.testing.damage(model)}
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.fill_(1e-7)
            block.ls2.gamma.fill_(1e-7)
    names = {name for name, _ in vitlib.testing.damage(model)}
    assert not names & {"swapped q and k", "exchanged heads of keys", "wrong eps"}


def test_damage_leaves_modes_weights_and_random_numbers_alone() -> None:
    model = tiny("dinov2", depth=2).train()
    model.blocks[0].eval()
    state = torch.get_rng_state()
    damaged = list(vitlib.testing.damage(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.blocks[1].training
    assert not model.blocks[0].training
    weights = {id(parameter) for parameter in model.parameters()}
    for _, broken in damaged:
        assert broken.training
        assert not weights & {id(parameter) for parameter in broken.parameters()}


def test_damage_of_the_demo_is_seen_by_assert_same() -> None:
    model = vitlib.load("demo")
    images = torch.randn(2, *(model.config.in_channels, *model.config.image_size))
    count = 0
    for name, broken in vitlib.testing.damage(model):
        with pytest.raises(AssertionError, match="differ in logits"):
            vitlib.testing.assert_same(broken, model, images, atol=1e-5)
        count += 1
        assert name
    assert count >= 8
