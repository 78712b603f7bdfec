"""Models of timm with rotary tables, RMSNorm, norms inside a block, or a pool of other heads.

timm made the files and their outputs (fixtures/make_timm_rotary.py). test_layouts.py proves logits
and tokens of each, and the files that vitlib writes; this file proves pools, vitlib's own layout,
and that each fact matters. Bare files are in test_timm_rotary_bare.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import vitlib
from fixtures import references
from fixtures.layout_files import make_pixels
from fixtures.timm_folders import TIMM
from fixtures.timm_rotary import LEARNED, NAMES, ROTARY, load_model, rebuild
from vitlib.checkpoint.layouts.equivalences import join_rotary_pairs

TINY = 2e-6  # as in test_parity.py
DIFFERS = 1e-3
GRIDS = ((16, 16), (12, 20), (24, 24))
Damage = Callable[[vitlib.ViT], vitlib.ViT]


@torch.inference_mode()
def compare(model: vitlib.ViT, name: str) -> float:
    """Return the largest error of logits, pooled vectors and tokens, on and off the grid."""
    expected, errors = load_file(TIMM / f"{name}.expected.safetensors"), []
    for height, width in GRIDS:
        images, size = make_pixels(height, width), f"{height}x{width}"
        tokens = model.forward_features(images)
        errors.append(references.distance(model(images), expected[f"logits@{size}"]))
        errors.append(references.distance(tokens, expected[f"features@{size}"]))
        errors.append(references.distance(model.pool(tokens), expected[f"pooled@{size}"]))
    return max(errors)


def test_names_are_those_of_the_script() -> None:
    manifest = json.loads((TIMM / "manifest.json").read_text())
    assert {name for name, entry in manifest.items() if "norm_layer_eps" in entry} >= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_load_equals_timm_on_and_off_the_grid(name: str) -> None:
    assert compare(load_model(name), name) < TINY


@pytest.mark.parametrize("name", NAMES)
def test_save_in_own_layout_keeps_every_field(name: str, tmp_path: Path) -> None:
    model = load_model(name)
    vitlib.save(model, tmp_path, layout="vitlib")
    again = vitlib.load(tmp_path)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert compare(again, name) < TINY


def _without_rope(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, rope=None)


def _other_theta(model: vitlib.ViT) -> vitlib.ViT:
    assert model.config.rope is not None
    return rebuild(model, "rope", theta=model.config.rope.theta / 4)


def _other_axes(model: vitlib.ViT) -> vitlib.ViT:
    assert model.config.rope is not None
    return rebuild(model, "rope", axes="ij" if model.config.rope.axes == "xy" else "xy")


def _without_offset(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "rope", offset=0.0)


def _without_reference_grid(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "rope", reference_grid=None)


def _apart_pairs(model: vitlib.ViT) -> vitlib.ViT:
    state = dict(model.state_dict())
    join_rotary_pairs(model.config, state, inverse=True)
    model.load_state_dict(state)
    return model


def _frequencies_of_the_other_block(model: vitlib.ViT) -> vitlib.ViT:
    frequencies = model.get_parameter("attn_position.freqs")
    with torch.no_grad():
        frequencies.copy_(frequencies.flip(1))
    return model


def _layer_norm(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", kind="layer")


def _norms_before_branches(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", post=False)


def _without_norm_in_attention(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", attn=False)


def _without_norm_in_mlp(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", mlp=False)


def _without_norm_of_patches(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", patch=False)


def _without_norm_of_keys(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "norms", qk=None)


def _other_pool_heads(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "attention_pool", num_heads=4)


def _pool_of_registers_too(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "attention_pool", prefix_tokens=True)


def _pool_of_patches(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "attention_pool", prefix_tokens=False)


def _keys_of_other_heads(model: vitlib.ViT) -> vitlib.ViT:
    """Give head 2 the keys of head 1, as if the heads of a group were not neighbours."""
    with torch.no_grad():
        for layer in (model.blocks[0].attn.k, model.blocks[0].attn.v):
            assert isinstance(layer, nn.Linear)
            for tensor in (layer.weight, layer.bias):
                heads = tensor.view(4, 8, *tensor.shape[1:])
                assert torch.equal(heads[0], heads[1])
                heads.copy_(heads[[0, 2, 1, 3]])
    return model


def _scale_of_mlp(model: vitlib.ViT) -> vitlib.ViT:
    with torch.no_grad():
        model.get_parameter("blocks.0.ls2.gamma").fill_(0.5)
    return model


CONTROLS: list[tuple[str, Damage]] = [
    *((name, _without_rope) for name in (*ROTARY, "sapiens2")),
    *((name, _other_theta) for name in (*ROTARY, "sapiens2")),
    *((name, _apart_pairs) for name in (*ROTARY, *LEARNED)),
    *((name, _other_axes) for name in (*ROTARY, *LEARNED, "sapiens2")),
    *((name, _without_offset) for name in ("pe_core", "pe_lang", "pe_spatial")),
    *((name, _without_reference_grid) for name in ROTARY if not name.startswith("rope_axial")),
    *((name, _frequencies_of_the_other_block) for name in LEARNED),
    *((name, _layer_norm) for name in ("aimv2", "sapiens2", "rms_norm")),
    *((name, _norms_before_branches) for name in ("eva02_e", "post_norm")),
    *((name, _without_norm_in_attention) for name in ("eva02_clip", "beit3")),
    *((name, _without_norm_in_mlp) for name in ("eva02", "eva02_clip", "beit3")),
    *((name, _other_pool_heads) for name in ("pe_core", "pe_core_no_class_token")),
    ("aimv2", _without_norm_of_patches),
    ("sapiens2", _without_norm_of_keys),
    ("sapiens2", _keys_of_other_heads),
    ("sapiens2", _scale_of_mlp),
    ("pe_core", _pool_of_patches),
    ("reg4_map", _pool_of_registers_too),
]


@pytest.mark.parametrize(
    ("name", "damage"), CONTROLS, ids=lambda value: getattr(value, "__name__", value)
)
def test_another_fact_gives_other_numbers(name: str, damage: Damage) -> None:
    assert compare(damage(load_model(name)), name) > DIFFERS
