"""Exact moves between the tensors of a library and vitlib's, and their inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vitlib
from vitlib import ViTConfig
from vitlib.checkpoint.layouts.equivalences import (
    drop_unit_layer_scale,
    expand_key_heads,
    fill_layer_scale,
    join_rotary_pairs,
    share_key_heads,
)
from vitlib.config_parts import Norms, Rope
from vitlib.errors import ConfigError

SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2}


def build_state(cfg: ViTConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in vitlib.ViT(cfg).state_dict().items()}
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_joined_pairs_are_halves_of_each_head() -> None:
    cfg = ViTConfig(**SIZES, num_heads=2, rope=Rope(coords="index"), norms=Norms(qk="head"))
    state = build_state(cfg)
    state["blocks.0.attn.q.bias"] = torch.arange(16.0)
    state["blocks.1.attn.k_norm.weight"] = torch.arange(8.0)
    before = dict(state)
    join_rotary_pairs(cfg, state)
    assert state["blocks.0.attn.q.bias"].tolist() == [
        *(0, 2, 4, 6, 1, 3, 5, 7),
        *(8, 10, 12, 14, 9, 11, 13, 15),
    ]
    assert state["blocks.1.attn.k_norm.weight"].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert all(name.split(".")[3] in ("q", "k", "q_norm", "k_norm") for name in changed)
    assert len(changed) == 2 * (4 + 4)
    join_rotary_pairs(cfg, state, inverse=True)
    assert_equal(state, before)


def test_joined_pairs_keep_scores() -> None:
    """Without a rotary table, a permutation of both queries and keys changes nothing."""
    cfg = ViTConfig(**SIZES, num_heads=2)
    model, images = vitlib.ViT(cfg).eval(), torch.randn(1, 3, 16, 16)
    state = dict(model.state_dict())
    join_rotary_pairs(cfg, state)
    other = vitlib.ViT(cfg).eval()
    other.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(other(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_shared_keys_are_copied_and_shared_again(group: int) -> None:
    cfg = ViTConfig(**SIZES, num_heads=4)
    state, rows = build_state(cfg), 16 // group
    for name in list(state):
        if ".attn.k." in name or ".attn.v." in name:
            state[name] = state[name][:rows].clone()
    before = dict(state)
    expand_key_heads(cfg, state)
    for name in ("blocks.0.attn.k.weight", "blocks.1.attn.v.bias"):
        heads, shared = state[name].unflatten(0, (4, 4)), before[name].unflatten(0, (-1, 4))
        assert all(torch.equal(heads[i], shared[i // group]) for i in range(4))
    assert share_key_heads(cfg, state) == [4 // group] * 2
    assert_equal(state, before)


def test_sharing_takes_keys_and_values_together() -> None:
    """A block whose values differ has no shared heads, even if all of its keys are equal."""
    cfg = ViTConfig(**SIZES, num_heads=4)
    state = build_state(cfg)
    for index in range(2):
        for name in ("k.weight", "k.bias", *(("v.weight", "v.bias") if index else ())):
            key = f"blocks.{index}.attn.{name}"
            state[key] = state[key].unflatten(0, (4, 4))[[0, 0, 2, 2]].flatten(0, 1)
    before = dict(state)
    assert share_key_heads(cfg, state) == [4, 2]
    assert torch.equal(state["blocks.0.attn.k.weight"], before["blocks.0.attn.k.weight"])
    assert state["blocks.1.attn.v.weight"].shape == (8, 16)
    expand_key_heads(cfg, state)
    assert_equal(state, before)


@pytest.mark.parametrize("rows", [6, 12, 32])
def test_keys_of_no_whole_heads_are_left_for_the_check_of_shapes(rows: int) -> None:
    cfg = ViTConfig(**SIZES, num_heads=4)
    state = {"blocks.0.attn.k.weight": torch.ones(rows, 16)}
    expand_key_heads(cfg, state)
    assert state["blocks.0.attn.k.weight"].shape == (rows, 16)


def test_layer_scale_of_attention_alone_is_filled_and_dropped() -> None:
    cfg = ViTConfig(**SIZES, num_heads=4, layer_scale=1.0)
    state = build_state(cfg)
    for index in range(2):
        del state[f"blocks.{index}.ls2.gamma"]
    before = dict(state)
    fill_layer_scale(cfg, state)
    assert torch.equal(state["blocks.1.ls2.gamma"], torch.ones(16))
    assert state.keys() == vitlib.ViT(cfg).state_dict().keys()
    drop_unit_layer_scale(cfg, state)
    assert_equal(state, before)


def test_layer_scale_of_both_branches_is_left() -> None:
    cfg = ViTConfig(**SIZES, num_heads=4, layer_scale=1.0)
    state = build_state(cfg)
    before = dict(state)
    fill_layer_scale(cfg, state)
    assert_equal(state, before)
    with pytest.raises(ConfigError, match=r"blocks\.0\.ls2\.gamma has other numbers than 1: fam"):
        drop_unit_layer_scale(cfg, state)


def test_model_without_layer_scale_gets_none() -> None:
    cfg = ViTConfig(**SIZES, num_heads=4)
    state = build_state(cfg)
    before = dict(state)
    fill_layer_scale(cfg, state)
    assert_equal(state, before)
