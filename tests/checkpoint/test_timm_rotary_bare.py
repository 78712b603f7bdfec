"""Weights files without a config, of timm's models with rotary tables and rare norms."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from fixtures.layout_files import make_pixels
from fixtures.timm_folders import TIMM, save_bare
from fixtures.timm_rotary import NAMES, load_model
from vitlib.errors import CheckpointError

ASKED = {
    **dict.fromkeys(
        ("eva02", "eva02_clip", "rope_mixed", "rope_mixed_ape", "aimv2", "beit3", "sapiens2"),
        r"of no usual ViT.*architecture= \(--architecture\)",
    ),
    "rms_norm": r"of no usual ViT.*architecture= \(--architecture\)",
    "pe_core_no_class_token": r"of no usual ViT.*architecture= \(--architecture\)",
    "rope_axial": r"without any positions.*architecture= \(--architecture\)",
    "rope_reg_gap": r"without any positions.*architecture= \(--architecture\)",
    "pe_core": "rotary frequencies of no usual ViT",
    "reg4_map": "whether the pool reads these too",
    "pe_lang": "missing: norm.weight",
    "pe_spatial": "missing: norm.weight",
}
ARCHITECTURES = {
    "eva02": "eva02_base_patch14_448",
    "eva02_clip": "eva02_base_patch16_clip_224",
    "eva02_e": "eva02_enormous_patch14_clip_224",
    "pe_core": "vit_pe_core_base_patch16_224",
    "pe_core_no_class_token": "vit_pe_core_gigantic_patch14_448",
    "pe_lang": "vit_pe_lang_large_patch14_448",
    "rope_axial_ape": "vit_small_patch16_rope_ape_224",
    "aimv2": "aimv2_large_patch14_224",
    "beit3": "beit3_base_patch16_224",
    "rms_norm": "test_vit4",
    "post_norm": "vit_base_patch16_rpn_224",
}
# The tensors say the number of heads: frequencies have an axis of heads, and a norm their width.
HEADS = {
    "rope_mixed": "vit_small_patch16_rope_mixed_224",
    "rope_mixed_ape": "vit_small_patch16_rope_mixed_ape_224",
    "sapiens2": "vit_base_patch16_sapiens2",
}
PUBLISHED = [
    "eva02_tiny_patch14_336",
    "eva02_small_patch14_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_ape_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_medium_patch16_rope_reg1_gap_256",
    "beit3_base_patch16_224",
    "vit_base_patch16_sapiens2",
    "test_vit4",
    "vit_base_patch16_rpn_224",
]


def copy_weights(name: str, folder: Path) -> Path:
    """Copy the weights file of a fixture without its config."""
    return Path(shutil.copy(TIMM / name / "model.safetensors", folder / "m.safetensors"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_bare_file_of_published_widths_opens_as_that_model(name: str, tmp_path: Path) -> None:
    """A bare file does not say the size of images where no tensor has the size of a grid."""
    published = vitlib.ViTConfig.named(name)
    side = 14 * published.patch_size[0]
    cfg = replace(published, depth=1, image_size=(side, side))
    assert vitlib.load(save_bare(vitlib.ViT(cfg), tmp_path)).config == cfg


@pytest.mark.parametrize("name", ASKED)
def test_bare_file_of_other_widths_asks(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=ASKED[name]) as error:
        vitlib.load(copy_weights(name, tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bare_file_opens_with_its_architecture(name: str, tmp_path: Path) -> None:
    model, path = load_model(name), copy_weights(name, tmp_path)
    stated = {"architecture": ARCHITECTURES[name], "num_heads": model.config.num_heads}
    again = vitlib.load(path, **stated)
    assert again.config == model.config
    with torch.inference_mode():
        assert torch.equal(again(make_pixels(12, 20)), model(make_pixels(12, 20)))


@pytest.mark.parametrize("name", HEADS)
def test_bare_file_says_its_heads_itself(name: str, tmp_path: Path) -> None:
    model, path = load_model(name), copy_weights(name, tmp_path)
    again = vitlib.load(path, architecture=HEADS[name])
    assert again.config.num_heads == model.config.num_heads
    with torch.inference_mode():
        assert torch.equal(again(make_pixels(12, 20)), model(make_pixels(12, 20)))


@pytest.mark.parametrize("name", ["eva02", "rope_mixed", "aimv2", "sapiens2"])
def test_state_dict_without_vitlib_json_is_refused(name: str, tmp_path: Path) -> None:
    model = load_model(name)
    path = tmp_path / "m.safetensors"
    save_file(dict(model.state_dict()), path)
    with pytest.raises(CheckpointError, match=r"no vitlib\.json beside the file: expected"):
        vitlib.load(path)
    again = vitlib.load(path, config=model.config)
    with torch.inference_mode():
        assert torch.equal(again(make_pixels(12, 20)), model(make_pixels(12, 20)))


@pytest.mark.parametrize("name", sorted({*NAMES} - ASKED.keys()))
def test_bare_file_with_tensors_of_a_usual_vit_opens_with_a_warning(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors of these four are those of models without a rotary table and with pre-norm, too."""
    assert name in ("eva02_tiny", "eva02_e", "rope_axial_ape", "post_norm")
    with caplog.at_level(logging.WARNING, "vitlib"):
        model = vitlib.load(copy_weights(name, tmp_path))
    assert (model.config.rope, model.config.norms.post) == (None, False)
    assert "rope=None. If this is wrong, give num_heads=" in caplog.messages[-1]


def test_load_names_frequencies_of_another_shape(tmp_path: Path) -> None:
    shutil.copytree(TIMM / "rope_mixed", tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"rope.freqs": tensors["rope.freqs"][:, :1].contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"rope\.freqs is 2x1x2x4, expected 2x2x2x4"):
        vitlib.load(tmp_path / "m")
