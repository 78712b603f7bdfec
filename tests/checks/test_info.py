"""info: what a checkpoint is, in every layout, and how each library would run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from fixtures import references
from paths import FIXTURES
from vitlib.checks import info, profiles


def test_what_a_checkpoint_is(dinov2_small: Path) -> None:
    found = info(dinov2_small)
    assert found.config.family == "dinov2"
    assert found.auxiliary == ("embeddings.mask_token",)
    assert found.tensors == 223
    assert found.parameters == 22_056_192  # the mask token's 384 are not among them
    assert found.problems == ()
    assert found.image_processor is not None
    assert json.loads(json.dumps(found.as_dict()))["config"]["grid_size"] == [37, 37]


def test_what_would_not_load_is_told(tmp_path: Path) -> None:
    references.saved("vit masked", tmp_path)
    found = info(tmp_path)
    assert found.ignored == ("decoder.0.bias", "decoder.0.weight")
    assert found.problems == ()
    assert "preprocessor_config.json" in found.image_processor_error
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.layernorm.weight"]
    save_file(
        {**tensors, "odd": tensors["vit.layernorm.bias"].clone()}, tmp_path / "model.safetensors"
    )
    assert info(tmp_path).problems == ("missing: layernorm.weight", "unexpected: odd")


def test_what_no_file_says_is_told() -> None:
    found = info(FIXTURES / "torchvision" / "vit.pth")
    assert (found.layout, found.profile) == ("torchvision", "torchvision")
    assert set(found.assumed) == {"num_heads", "norm_eps", "activation", "position_resize"}
    assert found.as_dict()["assumed"]["norm_eps"] == 1e-6
    given = info(FIXTURES / "torchvision" / "vit.pth", num_heads=2)
    assert "num_heads" not in given.assumed
    assert given.config.num_heads == 2
    assert "num_heads" not in info(FIXTURES / "timm" / "vit").assumed  # timm's config.json says it


@pytest.mark.parametrize("layout", ["timm", "torchvision", "openclip", "meta", "jax"])
def test_every_layout(layout: str) -> None:
    folder = FIXTURES / layout
    for name in json.loads((folder / "manifest.json").read_text()):
        path = next(p for p in (folder / name, *folder.glob(f"{name}.[pn]*")) if p.exists())
        if name == "bigvit_sincos":  # has no positions, and is refused
            continue
        found = info(path)
        assert found.layout == layout, name
        assert found.problems == (), name
        assert json.loads(json.dumps(found.as_dict()))["family"] == found.config.family


def test_what_lay_beside_a_network_is_ignored_and_told(tmp_path: Path) -> None:
    references.saved("vit", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    training = {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3}
    torch.save(training, tmp_path / "pytorch_model.bin")
    found = info(tmp_path)
    assert found.ignored == ("optimizer", "epoch")
    assert found.problems == ()


def test_profiles(tmp_path: Path) -> None:
    references.saved("vit tanh gelu", tmp_path)
    both = profiles(tmp_path)
    assert (both.family, both.own) == ("vit", "hf")
    assert list(both.numbers) == ["hf", "timm", "original", "jax", "torchvision"]
    # The files' own column is what they say, not what their library mostly does.
    assert both.numbers["hf"]["activation"] == "gelu_tanh"
    assert both.numbers["timm"]["activation"] == "gelu"
    assert {name: numbers["norm_eps"] for name, numbers in both.numbers.items()} == {
        "hf": 1e-12,
        "timm": 1e-6,
        "original": 1e-6,
        "jax": 1e-6,
        "torchvision": 1e-6,
    }
    for name, numbers in both.numbers.items():
        if name != "hf":
            cfg = vitlib.load(tmp_path, profile=name).config
            assert numbers == {field: getattr(cfg, field) for field in numbers}
    assert both.image_processors["hf"] is None  # no file says it
    assert both.image_processors["jax"] is not None
    assert json.loads(json.dumps(both.as_dict()))["profiles"]["timm"]["norm_eps"] == 1e-6


def test_libraries_that_have_no_such_family_have_no_column(tmp_path: Path) -> None:
    references.saved("dinov2", tmp_path)
    assert list(profiles(tmp_path).numbers) == ["hf", "timm", "original"]
