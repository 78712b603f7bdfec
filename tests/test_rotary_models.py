"""Attention, explanations and optimize of timm's models with rotary tables and rare norms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitlib
from fixtures import references
from fixtures.layout_files import make_pixels
from fixtures.timm_rotary import NAMES, load_model, rebuild
from vitlib import ViTConfig, explain
from vitlib.config_parts import Norms, Pooling, Rope
from vitlib.fast import load as load_fast

MODELS = [*NAMES, "meta/vit5"]
TINY, FAST = 2e-6, 5e-6  # as in test_parity.py, and of optimize in fp32
ROPES: dict[str, dict[str, Any]] = {
    "index": {"coords": "index", "theta": 50.0, "offset": 1.0, "axes": "xy"},
    "reference grid": {"coords": "index", "reference_grid": (3, 5)},
    "learned": {"coords": "index", "learned": True, "theta": 10.0},
    "class token": {"class_token": True},
    "registers": {"coords": "index", "register_theta": 9.0},
    "class token and registers": {"coords": "index", "class_token": True, "register_theta": 9.0},
}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_attention_reproduces_forward(name: str) -> None:
    """Rows sum to 1; probabilities times values are what attention adds to the residual stream."""
    model, images = load_model(name), make_pixels(12, 20)
    attention, positions = model.attention(images), list(model.attn_positions(images))
    streams = list(model.iter_hidden_states(images, model.config.depth))
    assert len(attention) == model.config.depth
    for x, block, attn_pos, probabilities in zip(
        streams, model.blocks, positions, attention, strict=False
    ):
        assert probabilities.shape[-1] == model.num_prefix_tokens + 15
        assert (probabilities.sum(dim=-1) - 1).abs().max() <= 1e-6
        assert isinstance(block, vitlib.vit.Block)
        y = x if model.config.norms.post else block.norm1(x)
        branch = block.attn(y, None, attn_pos)
        assert references.distance(block.attn.apply_probs(probabilities, y), branch) < FAST


@pytest.mark.parametrize("name", MODELS)
def test_positions_change_attention(name: str) -> None:
    """Equal patches attend to each other alike unless a rotary table turns them."""
    model = load_model(name)
    with torch.no_grad():
        for key in ("patch_embed.pos_embed",):
            if key in dict(model.named_parameters()):
                model.get_parameter(key).zero_()
        rows = model.attention(torch.ones(1, 3, 16, 16), [0])[0]
    first = model.num_prefix_tokens
    patches = rows[0, :, first:, first:]
    differs = float((patches - patches[:, :1, :1]).abs().max())
    assert (differs > 1e-3) == (model.config.rope is not None)


@pytest.mark.parametrize("name", MODELS)
def test_explanations_cover_the_grid(name: str) -> None:
    model, images = load_model(name), make_pixels(12, 20)
    rollout = explain.attention_rollout(model, images)
    assert rollout.shape == (2, 3, 5)
    assert np.isfinite(rollout).all()
    assert np.ptp(rollout) > 0
    if not model.config.num_classes:
        return
    result = explain.forward_explicit(model, images)
    with torch.no_grad():
        assert references.distance(result.logits.detach(), model(images)) < TINY
    relevance = explain.relevance(model, images, 1)
    assert relevance.shape == (2, 3, 5)
    assert np.isfinite(relevance).all()
    assert not np.array_equal(relevance, explain.relevance(model, images, 2))


@pytest.mark.parametrize("name", MODELS)
def test_optimized_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, images = load_model(name), make_pixels(12, 20)
    fast = vitlib.optimize(model)
    fast.save(tmp_path)
    again = load_fast(tmp_path)
    with torch.inference_mode():
        assert references.distance(fast(images), model(images)) < FAST
        assert (
            references.distance(fast.forward_features(images), model.forward_features(images))
            < FAST
        )
        assert torch.equal(again(images), fast(images))
    assert again.config == model.config


def build(rope: dict[str, Any], **changes: Any) -> vitlib.ViT:
    """Build a random model with a rotary table."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    sizes["num_registers"] = 4 if "register_theta" in rope else 0
    model = vitlib.ViT(ViTConfig(**{**sizes, "num_classes": 3, "rope": rope, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ROPES)
def test_rope_of_config_is_saved(name: str, tmp_path: Path) -> None:
    model, images = build(ROPES[name]), make_pixels(12, 20)
    assert model.config.rope == Rope(**ROPES[name])
    vitlib.save(model, tmp_path / "own", layout="vitlib")
    again = vitlib.load(tmp_path / "own")
    assert again.config == model.config
    fast = vitlib.optimize(model)
    fast.save(tmp_path / "fast")
    loaded = load_fast(tmp_path / "fast")
    assert loaded.config == model.config
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))
        assert torch.equal(loaded(images), fast(images))
        assert references.distance(fast(images), model(images)) < FAST


def test_groups_of_fields_are_saved(tmp_path: Path) -> None:
    norms = Norms(kind="rms", patch=True, qk="width", attn=True, mlp=True)
    pooling = Pooling(num_heads=4, mlp_dim=24, prefix_tokens=False)
    model = build({"theta": 30.0}, norms=norms, attention_pool=pooling, pool="map", proj_bias=False)
    vitlib.save(model, tmp_path, layout="vitlib")
    cfg = vitlib.load(tmp_path).config
    assert (cfg.norms, cfg.attention_pool, cfg.rope) == (norms, pooling, Rope(theta=30.0))
    assert cfg == model.config
    assert cfg != replace(cfg, proj_bias=True)


def test_angles_of_the_class_token_turn_it() -> None:
    model, images = build({"class_token": True}), make_pixels(16, 16)
    with torch.inference_mode():
        before = model(images)
        model.get_parameter("attn_position.cls_angles").add_(1.0)
        assert references.distance(model(images), before) > 1e-3


def test_angles_of_registers_turn_them() -> None:
    model, images = build(ROPES["registers"]), make_pixels(16, 16)
    changed = rebuild(model, "rope", register_theta=4.0)
    without = rebuild(model, "rope", register_theta=None)
    with torch.inference_mode():
        assert references.distance(changed(images), model(images)) > 1e-4
        assert references.distance(without(images), model(images)) > 1e-4
