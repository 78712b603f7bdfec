"""Tests of vitlib.checks.info and vitlib.checks.profiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from fixtures import references
from fixtures.layout_files import read_architecture
from paths import FIXTURES
from vitlib.checks import info, profiles


def test_info_of_dinov2(dinov2_small: Path) -> None:
    result = info(dinov2_small)
    assert result.config.family == "dinov2"
    assert result.auxiliary == ("embeddings.mask_token",)
    assert result.tensors == 223
    assert result.parameters == 22_056_192  # without the 384 of the mask token
    assert result.problems == ()
    assert result.image_processor is not None
    assert json.loads(json.dumps(result.as_dict()))["config"]["grid_size"] == [37, 37]


def test_info_lists_ignored_tensors_and_problems(tmp_path: Path) -> None:
    references.save_model("vit masked", tmp_path)
    result = info(tmp_path)
    assert result.ignored == ("decoder.0.bias", "decoder.0.weight")
    assert result.problems == ()
    assert "preprocessor_config.json" in result.image_processor_error
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.layernorm.weight"]
    save_file(
        {**tensors, "odd": tensors["vit.layernorm.bias"].clone()}, tmp_path / "model.safetensors"
    )
    assert info(tmp_path).problems == ("missing: layernorm.weight", "unexpected: odd")


def test_info_lists_assumed_fields() -> None:
    result = info(FIXTURES / "torchvision" / "vit.pth")
    assert (result.layout, result.profile) == ("torchvision", "torchvision")
    assert set(result.assumed) == {"num_heads", "norm_eps", "activation", "position_resize"}
    assert result.as_dict()["assumed"]["norm_eps"] == 1e-6
    stated = info(FIXTURES / "torchvision" / "vit.pth", num_heads=2)
    assert "num_heads" not in stated.assumed
    assert stated.config.num_heads == 2
    assert "num_heads" not in info(FIXTURES / "timm" / "vit").assumed  # timm's config.json has it


@pytest.mark.parametrize("layout", ["timm", "torchvision", "openclip", "meta", "jax"])
def test_info_reads_every_layout(layout: str) -> None:
    folder = FIXTURES / layout
    for name in json.loads((folder / "manifest.json").read_text()):
        path = next(p for p in (folder / name, *folder.glob(f"{name}.[pn]*")) if p.exists())
        if name == "bigvit_sincos":  # without positions: refused
            continue
        result = info(path, architecture=read_architecture(f"{layout}/{name}"))
        assert result.layout == layout, name
        assert result.problems == (), name
        assert json.loads(json.dumps(result.as_dict()))["family"] == result.config.family


def test_info_lists_entries_beside_the_network(tmp_path: Path) -> None:
    references.save_model("vit", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    training = {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3}
    torch.save(training, tmp_path / "pytorch_model.bin")
    result = info(tmp_path)
    assert result.ignored == ("optimizer", "epoch")
    assert result.problems == ()


def test_profiles_of_vit(tmp_path: Path) -> None:
    references.save_model("vit tanh gelu", tmp_path)
    both = profiles(tmp_path)
    assert (both.family, both.own) == ("vit", "hf")
    assert list(both.numbers) == ["hf", "timm", "original", "jax", "torchvision"]
    # The column of the files' own library holds the files' numbers, not the library's usual ones.
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
    assert both.image_processors["hf"] is None  # no file has it
    assert both.image_processors["jax"] is not None
    assert json.loads(json.dumps(both.as_dict()))["profiles"]["timm"]["norm_eps"] == 1e-6


def test_profiles_leave_out_libraries_without_the_family(tmp_path: Path) -> None:
    references.save_model("dinov2", tmp_path)
    assert list(profiles(tmp_path).numbers) == ["hf", "timm", "original"]
