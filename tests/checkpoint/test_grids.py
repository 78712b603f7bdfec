"""Grids of patches that are not square: read from what says the size, or asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vitlib
from fixtures import references
from fixtures.pictures import photo_pixels
from paths import FIXTURES
from vitlib import explain, plots
from vitlib.checks.convert import convert

TIMM = FIXTURES / "timm_grids"
TINY = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "no class token": {"class_token": False, "pool": "mean"},
    "registers": {"family": "dinov2_with_registers", "num_registers": 3, "layer_scale": 1.0},
    "offsets": {
        "family": "beit",
        "pool": "mean",
        "final_norm": "pooled",
        "pos_embed": False,
        "relative_position": "block",
        "key_bias": False,
        "layer_scale": 0.1,
    },
}


def build(grid: tuple[int, int], **fields: Any) -> vitlib.ViT:
    torch.manual_seed(0)
    size = (4 * grid[0], 4 * grid[1])
    model = vitlib.ViT(vitlib.ViTConfig(**{**TINY, "image_size": size, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("name", sorted(p.name for p in TIMM.iterdir() if p.is_dir()))
def test_timm_of_a_grid_that_is_not_square(name: str, tmp_path: Path) -> None:
    expected = load_file(TIMM / f"{name}.outputs.safetensors")
    model = vitlib.load(TIMM / name)
    with torch.inference_mode():
        assert references.distance(model(expected["pixels"]), expected["logits"]) < 2e-6
        assert (
            references.distance(model.forward_features(expected["pixels"]), expected["tokens"])
            < 2e-6
        )
        if name == "registers_3x11_mean":  # no other layout has registers without a class token
            return
        vitlib.save(model, tmp_path, layout="timm")
        again = vitlib.load(tmp_path)
        assert references.distance(again(expected["pixels"]), expected["logits"]) < 2e-6


@pytest.mark.parametrize("grid", [(1, 4), (2, 8), (3, 12)])
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_keeps_the_grid_or_refuses(
    name: str, grid: tuple[int, int], tmp_path: Path
) -> None:
    model, written = build(grid, **MODELS[name]), []
    images = torch.randn(2, 3, 4 * grid[0], 4 * grid[1])
    for layout in ("hf", "timm", "meta", "torchvision", "openclip", "jax"):
        try:
            vitlib.save(model, tmp_path / layout, layout=layout)
        except vitlib.VitlibError:
            assert not (tmp_path / layout).exists()
            continue
        written.append(layout)
        again = vitlib.load(tmp_path / layout)
        assert again.config.grid_size == grid, layout
        with torch.inference_mode():
            assert references.distance(again(images), model(images)) < 2e-3, (
                layout
            )  # eps of layouts
    assert "timm" in written


@pytest.mark.parametrize("name", ["beit", "beit shared", "data2vec"])
def test_relative_positions_that_transformers_turns_are_refused(name: str, tmp_path: Path) -> None:
    """Transformers reshapes the table to (width, height): on such a grid it gives other numbers."""
    square = references.save_model(name, tmp_path / "square")
    square.config.image_size = (64, 32)
    reference = references.randomise(type(square)(square.config)).eval()
    reference.save_pretrained(tmp_path / "hf")
    with pytest.raises(vitlib.VitlibError, match=r"grid of 8x4 patches: .* give config=ViTConfig"):
        vitlib.load(tmp_path / "hf")
    file = shutil.copy(tmp_path / "hf/model.safetensors", tmp_path)
    (tmp_path / "vitlib.json").write_text(json.dumps({"image_size": [64, 32]}))
    model_type = reference.config.model_type
    with pytest.raises(vitlib.VitlibError, match="grid of 8x4 patches: "):
        vitlib.load(file, architecture=model_type)
    config = replace(vitlib.load(tmp_path / "square").config, image_size=(64, 32))
    model = vitlib.load(tmp_path / "hf", config=config).eval()
    images = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        assert references.distance(model(images), reference(images).logits) > 1e-3
        with pytest.raises(vitlib.VitlibError, match=r"relative positions of .* layout='timm'"):
            vitlib.save(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        vitlib.save(model, tmp_path / "timm", layout="timm")
        assert references.distance(vitlib.load(tmp_path / "timm")(images), model(images)) < 2e-6


def test_relative_positions_of_timm_are_not_converted_to_a_turned_table(tmp_path: Path) -> None:
    model = build((2, 8), **MODELS["offsets"])
    vitlib.save(model, tmp_path / "timm", layout="timm")
    with pytest.raises(vitlib.VitlibError, match=r"grid of 2x8 patches: .* layout='timm'"):
        convert(tmp_path / "timm", tmp_path / "hf", layout="hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("grid", [(1, 4), (3, 12)])
def test_maps_and_pictures_have_the_grid(grid: tuple[int, int], tmp_path: Path) -> None:
    model, (h, w) = build(grid), grid
    pixels = torch.randn(1, 3, 4 * h, 4 * w)
    assert model.forward_intermediates(pixels, [0], reshape=True)[0].shape == (1, 8, h, w)
    assert model.attention(pixels)[0].shape == (1, 2, 1 + h * w, 1 + h * w)
    maps = {
        "rollout": explain.attention_rollout(model, pixels),
        "relevance": explain.relevance(model, pixels, 1),
        "occlusion": explain.occlusion(model, pixels, 1),
        "similarity": explain.similarity(model, pixels),
        "foreground": explain.foreground(model, pixels),
        "pca": explain.patch_pca(model, pixels)[..., 0],
    }
    assert {name: array.shape for name, array in maps.items()} == dict.fromkeys(maps, (1, h, w))
    assert explain.head_maps(model, pixels).shape[-2:] == (h, w)
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")
    photo = Image.fromarray(np.full((20 * h, 20 * w, 3), 90, np.uint8))
    side = round(600 / w)  # of a patch: the photo is enlarged to 600 pixels
    figure = plots.overlay(photo, maps["rollout"][0])
    plots.save(figure, tmp_path / "overlay.png")
    assert photo_pixels(figure).shape == (side * h, 600, 3)
    # The bright place of a map lies over its patch.
    spot = np.zeros(grid)
    spot[h - 1, w - 1] = 1
    levels = photo_pixels(plots.overlay(photo, spot, strength=1.0))[..., 1]  # viridis ends in green
    y, x = np.unravel_index(levels.argmax(), levels.shape)
    assert (y // side, x // side) == (h - 1, w - 1)


def bare(folder: Path, grid: tuple[int, int]) -> Path:
    """The weights of a DeiT-like model alone."""
    folder.mkdir()
    vitlib.save(build(grid), folder, layout="timm")
    (folder / "config.json").unlink()
    return folder / "model.safetensors"


def test_a_size_that_nothing_says_is_asked_for(tmp_path: Path) -> None:
    path, images = bare(tmp_path / "a", (2, 3)), torch.randn(2, 3, 8, 12)
    model = build((2, 3))
    with pytest.raises(vitlib.VitlibError, match=r"7 positions are no square grid .* config="):
        vitlib.load(path, num_heads=2)
    options = vitlib.load(path, config=model.config)
    (path.parent / "vitlib.json").write_text(json.dumps({"image_size": [8, 12]}))
    read = vitlib.load(path, num_heads=2)
    with torch.inference_mode():
        assert torch.equal(options(images), model(images))
        assert torch.equal(read(images), model(images))


def test_an_image_size_that_could_be_the_learned_one_is_asked_about(tmp_path: Path) -> None:
    """Four positions are 2x2 patches to resample, or the 1x4 patches that the caller names."""
    path, images = bare(tmp_path / "a", (1, 4)), torch.randn(2, 3, 4, 16)
    with pytest.raises(vitlib.VitlibError, match="2x2 patches to resample, or 1x4 as they are"):
        vitlib.load(path, num_heads=2, image_size=(4, 16))
    (path.parent / "vitlib.json").write_text(json.dumps({"image_size": [4, 16]}))
    with torch.inference_mode():
        read = vitlib.load(path, num_heads=2, image_size=(4, 16))
        # The order of the sums may depend on where the weights lie.
        assert torch.allclose(read(images), build((1, 4))(images), atol=1e-6)


def test_registers_that_may_have_positions_are_asked_about(tmp_path: Path) -> None:
    tensors = load_file(TIMM / "registers_1x4/model.safetensors")  # 9 positions: 3x3, or 5 + 2x2
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(vitlib.VitlibError, match="9 positions may belong to patches only"):
        vitlib.load(tmp_path, num_heads=2)
    (tmp_path / "vitlib.json").write_text(json.dumps({"image_size": [4, 16]}))
    expected = load_file(TIMM / "registers_1x4.outputs.safetensors")
    with torch.inference_mode():
        model = vitlib.load(tmp_path, num_heads=2)
        assert references.distance(model(expected["pixels"]), expected["logits"]) < 2e-6
