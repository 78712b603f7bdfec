"""Tensors of a file that vitlib computes again: periods, masks, indices, key biases."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from fixtures.timm_folders import TIMM
from paths import FIXTURES


def test_load_rejects_other_rope_periods_and_bias_masks(tmp_path: Path) -> None:
    """The original DINOv3 code reads its periods and its mask from the file."""
    path = FIXTURES / "meta/dinov3.pth"
    tensors = torch.load(path, weights_only=True)
    for name, other in (
        ("rope_embed.periods", lambda t: t**0.5),
        ("blocks.0.attn.qkv.bias_mask", torch.ones_like),
    ):
        changed = {key: other(t) if key == name else t for key, t in tensors.items()}
        torch.save(changed, tmp_path / "m.pth")
        with pytest.raises(vitlib.VitlibError, match=f"{name}: "):
            vitlib.load(tmp_path / "m.pth")
    assert vitlib.load(path).config.num_heads == 2  # the number of periods gives it


def test_load_rejects_other_relative_position_index(tmp_path: Path) -> None:
    tensors = torch.load(FIXTURES / "meta/beit.pth", weights_only=True)["model"]
    (name,) = [name for name in tensors if name.endswith("0.attn.relative_position_index")]
    torch.save({"model": tensors | {name: tensors[name].T.contiguous()}}, tmp_path / "m.pth")
    with pytest.raises(vitlib.VitlibError, match="its rows are not BEiT's"):
        vitlib.load(tmp_path / "m.pth")


def test_key_bias_is_ignored(tmp_path: Path) -> None:
    """A key bias adds one constant to all scores of a query, which softmax removes."""
    shutil.copytree(TIMM / "beit", tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = load_file(path)
    bias = torch.randn(tensors["blocks.0.attn.q_bias"].shape)
    save_file(tensors | {"blocks.0.attn.k_bias": bias}, path)
    images = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(vitlib.load(tmp_path / "m")(images), vitlib.load(TIMM / "beit")(images))
        model = vitlib.load(TIMM / "beit", config=None)
        expected = model(images)
        attention = model.blocks[0].attn
        attention.k.bias = torch.nn.Parameter(bias)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
