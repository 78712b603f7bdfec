"""Weights files of timm without a config.json, and training checkpoints."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from fixtures.timm_folders import TIMM, save_bare, small_model
from vitlib import ImageProcessor


def test_load_rejects_architecture_with_other_tensors(tmp_path: Path) -> None:
    path = save_bare(small_model(embed_dim=384, num_heads=6), tmp_path)
    with pytest.raises(vitlib.VitlibError, match="architecture='vit_base_patch16_gap_224'") as e:
        vitlib.load(path, architecture="vit_base_patch16_gap_224")
    assert "class_token False (the tensors have True)" in str(e.value)


@pytest.mark.parametrize(
    ("fields", "layout", "pool", "assumed"),
    [
        # Google's models with these shapes use a mean of 0.5, DINO's and DeiT's use ImageNet's.
        ({"embed_dim": 384, "num_heads": 6}, "timm", "cls", "minus 0.5 0.5 0.5"),
        ({"embed_dim": 384, "num_heads": 6, "num_classes": 0}, "meta", "cls", "minus 0.485"),
        (
            {"embed_dim": 768, "pool": "mean", "final_norm": "pooled", "family": "vit_mae"},
            "meta",
            "mean",
            "",
        ),
        (
            {"embed_dim": 384, "num_heads": 6, "patch_size": 14, "image_size": 28}
            | {"layer_scale": 1.0, "family": "dinov2", "num_classes": 0},
            "meta",
            "cls",
            "",
        ),
    ],
)
def test_bare_file_with_published_shapes_assumes_only_preprocessing(
    fields: dict[str, Any],
    layout: str,
    pool: str,
    assumed: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All published models with these shapes share an architecture, but not preprocessing."""
    path = save_bare(small_model(**fields), tmp_path, layout)
    with caplog.at_level(logging.WARNING, "vitlib"):
        config = vitlib.load(path).config
    assert (config.num_heads, config.pool) == (fields.get("num_heads", 12), pool)
    lines = [line for line in caplog.messages if "assumed" in line]
    assert len(lines) == bool(assumed)
    assert all("preprocessing assumed" in line and assumed in line for line in lines)
    caplog.clear()
    # Each remedy of that line states the preprocessing, so nothing is assumed.
    vitlib.load(path, profile="hf")
    vitlib.load(path, image_processor=ImageProcessor(size=(32, 32)))
    processor = ImageProcessor(size=(32, 32), image_mean=(0.1,) * 3, image_std=(0.2,) * 3)
    (path.parent / "preprocessor_config.json").write_text(json.dumps(processor.to_dict()))
    model = vitlib.load(path)
    assert isinstance(model.image_processor, ImageProcessor)
    assert model.image_processor.image_mean == processor.image_mean
    assert not [line for line in caplog.messages if "assumed" in line]


def test_bare_file_with_unpublished_shapes_logs_assumptions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_bare(small_model(embed_dim=48, num_heads=1), tmp_path)
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(path)
    (line,) = [line for line in caplog.messages if "assumed" in line]
    assert all(field in line for field in ("num_heads=1", "activation='gelu'", "pool='cls'"))


def test_bare_file_with_shapes_of_two_models_needs_a_fact(tmp_path: Path) -> None:
    """The GELU of timm's large SigLIP, erf or tanh, depends on the image size."""
    fields = {"embed_dim": 1024, "num_heads": 16, "family": "siglip", "attention_pool": True}
    fields |= {"class_token": False, "pool": "map", "num_classes": 0}
    path = save_bare(small_model(**fields), tmp_path)
    with pytest.raises(vitlib.VitlibError, match="state which with activation='gelu'") as error:
        vitlib.load(path)
    assert "vit_large_patch16_siglip_512" in str(error.value)
    for stated, activation in (
        ({"activation": "gelu"}, "gelu"),
        ({"activation": "gelu_tanh"}, "gelu_tanh"),
        ({"architecture": "vit_large_patch16_siglip_512"}, "gelu_tanh"),
        ({"architecture": "vit_large_patch16_siglip_256"}, "gelu"),
    ):
        assert vitlib.load(path, **stated).config.activation == activation


def test_bare_file_with_shapes_of_one_model_is_read_as_it(tmp_path: Path) -> None:
    """Only vit_base_patch16_rpn_224 has no qkv bias; its norms come after the branches."""
    fields = {"qkv_bias": False, "class_token": False, "pool": "mean", "final_norm": "pooled"}
    path = save_bare(small_model(**fields), tmp_path)
    assert vitlib.load(path).config.norms.post is True


def test_bare_file_without_norm_is_rejected(tmp_path: Path) -> None:
    """Only published models such as RADIO's may lack the final norm."""
    tensors = load_file(save_bare(small_model(embed_dim=48, num_heads=1), tmp_path))
    without = {name: t for name, t in tensors.items() if not name.startswith("norm.")}
    save_file(without, tmp_path / "without.safetensors")
    with pytest.raises(vitlib.VitlibError, match=r"missing: norm\.weight"):
        vitlib.load(tmp_path / "without.safetensors")


def test_bare_file_with_learned_rotation_is_rejected(tmp_path: Path) -> None:
    tensors = load_file(TIMM / "vit/model.safetensors")
    save_file(tensors | {"rope.freqs": torch.ones(2, 2, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(vitlib.VitlibError, match="rotary frequencies of no usual"):
        vitlib.load(tmp_path / "m.safetensors", num_heads=2)


def test_verify_lists_assumed_num_heads(tmp_path: Path) -> None:
    from vitlib.checks import verify

    published_shape = save_bare(small_model(embed_dim=384, num_heads=6), tmp_path / "a")
    assert verify(published_shape).unverified[0] == "num_heads=6"
    other = save_bare(small_model(embed_dim=48, num_heads=1), tmp_path / "b")
    assert verify(other).unverified[0] == "num_heads=1 (can be wrong)"
    assert verify(TIMM / "vit").unverified == ()


def test_arch_of_training_checkpoint_decides(tmp_path: Path) -> None:
    """Only an architecture that timm's train.py saved as "arch" settles the open facts."""
    fields = {"embed_dim": 1024, "num_heads": 16, "family": "siglip", "attention_pool": True}
    fields |= {"class_token": False, "pool": "map", "num_classes": 0}
    tensors = load_file(save_bare(small_model(**fields), tmp_path))

    def save_as(arch: str) -> Path:
        path = tmp_path / f"{arch}.pth.tar"
        torch.save({"arch": arch, "state_dict": tensors}, path)
        return path

    for arch, activation in (
        ("vit_large_patch16_siglip_512", "gelu_tanh"),
        ("vit_large_patch16_siglip_256", "gelu"),
    ):
        assert vitlib.load(save_as(arch), layout="timm").config.activation == activation
    with pytest.raises(vitlib.VitlibError, match="state which with activation='gelu'"):
        vitlib.load(save_as("my_model"), layout="timm")


def test_checkpoint_of_timms_training_runs_as_timms(tmp_path: Path) -> None:
    """A wrapper alone is a mark of the original code, whose rule of positions is another."""
    tensors = load_file(save_bare(small_model(embed_dim=192, num_heads=3), tmp_path))
    for arch, rule in (
        ("vit_tiny_patch16_224", "bicubic_antialias"),
        ("my_model", "bicubic_offset"),
    ):
        path = tmp_path / f"{arch}.pth.tar"
        torch.save({"epoch": 1, "arch": arch, "state_dict": tensors, "version": 2}, path)
        assert vitlib.load(path).config.positions.resize == rule


def test_name_of_timm_states_the_preprocessing(tmp_path: Path) -> None:
    """As timm's create_model(name, checkpoint_path=...) takes it from the default weights."""
    file = save_bare(small_model(embed_dim=192, num_heads=3), tmp_path)
    trained = tmp_path / "last.pth.tar"
    torch.save({"arch": "deit_tiny_patch16_224", "state_dict": load_file(file)}, trained)
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    for path, name, mean in (
        (file, None, half),
        (file, "vit_tiny_patch16_224", half),
        (file, "deit_tiny_patch16_224", imagenet),
        (trained, None, imagenet),
        (trained, "vit_tiny_patch16_224.augreg_in21k", half),
    ):
        assert vitlib.load(path, architecture=name).image_processor.image_mean == mean


def test_vit_small_of_moco_v3_needs_num_heads(tmp_path: Path) -> None:
    tensors = load_file(save_bare(small_model(embed_dim=384, num_heads=6), tmp_path))
    path = tmp_path / "linear.pth.tar"
    torch.save({"arch": "vit_small", "state_dict": tensors}, path)
    with pytest.raises(vitlib.VitlibError, match=r"num_heads=12 .*moco-v3") as error:
        vitlib.load(path)
    assert "state which with num_heads=6" in str(error.value)
    assert [vitlib.load(path, num_heads=n).config.num_heads for n in (6, 12)] == [6, 12]
