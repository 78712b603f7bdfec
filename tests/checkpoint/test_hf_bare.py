"""Files of Hugging Face's without their config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import vitlib
from fixtures import references

TINY = 2e-6


def bare(source: Path, folder: Path) -> Path:
    folder.mkdir()
    (source / "model.safetensors").rename(folder / "model.safetensors")
    return folder / "model.safetensors"


WIDE = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}


def test_bare_file_of_one_published_model_logs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = hf.ViTConfig(**WIDE, num_hidden_layers=1, patch_size=8, image_size=32)
    reference = references.randomise(hf.ViTModel(config, add_pooling_layer=False))  # DINO
    reference.save_pretrained(tmp_path / "expected")
    model = vitlib.load(bare(tmp_path / "expected", tmp_path / "bare"))
    assert (model.config.num_heads, model.config.norm_eps) == (6, 1e-12)
    assert not caplog.text


def test_bare_file_of_two_published_models_needs_architecture(tmp_path: Path) -> None:
    """DINO's and MSN's ViT-S/16 have the same tensors, and another eps."""
    config = hf.ViTMSNConfig(**WIDE, num_hidden_layers=1, patch_size=16, image_size=32)
    references.randomise(hf.ViTMSNModel(config)).save_pretrained(tmp_path / "expected")
    file = bare(tmp_path / "expected", tmp_path / "bare")
    with pytest.raises(vitlib.VitlibError, match=r"norm_eps=1e-12.*norm_eps=1e-06") as error:
        vitlib.load(file)
    remedy = re.search(r"architecture='([^']+)'", str(error.value))
    assert remedy is not None
    assert vitlib.load(file, architecture=remedy[1]).config.norm_eps == 1e-12
    for name in ("vit_msn", "facebook/vit-msn-small"):
        model = vitlib.load(file, architecture=name)
        assert (model.config.norm_eps, model.config.num_heads) == (1e-6, 6)
    with pytest.raises(vitlib.VitlibError, match="knows vit, vit_mae, vit_msn"):
        vitlib.load(file, architecture="dinov2")


def test_bare_clip_needs_activation(tmp_path: Path) -> None:
    wide = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    config = hf.CLIPVisionConfig(**wide, num_hidden_layers=1, image_size=64, patch_size=32)
    references.randomise(hf.CLIPVisionModel(config)).save_pretrained(tmp_path / "expected")
    file = bare(tmp_path / "expected", tmp_path / "bare")
    with pytest.raises(vitlib.VitlibError, match="activation='quick_gelu' or architecture="):
        vitlib.load(file)
    for name in ("quick_gelu", "gelu"):
        assert vitlib.load(file, activation=name).config.activation == name


@pytest.mark.parametrize(
    ("name", "message", "facts"),
    [
        ("vit", "num_heads=", {"num_heads": 4}),
        ("msn base", "architecture='vit' or", {"num_heads": 4, "architecture": "vit_msn"}),
        ("clip base", "activation=", {"num_heads": 4, "activation": "quick_gelu"}),
        ("dinov3", "num_heads=", {"num_heads": 4}),
        ("beit base", "architecture='beit' or", {"architecture": "beit"}),
        ("beit absolute", "num_heads=", {"num_heads": 4, "architecture": "beit"}),
    ],
)
def test_bare_file_of_unpublished_shape_needs_facts(
    name: str, message: str, facts: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = references.save_model(name, tmp_path / "expected")
    file = bare(tmp_path / "expected", tmp_path / "bare")
    with pytest.raises(vitlib.VitlibError, match=re.escape(message)) as error:
        vitlib.load(file)
    assert "no published model is of width 48" in str(error.value)
    model = vitlib.load(file, **facts)
    assert "norm_eps=" in caplog.text
    images = references.make_pixels(reference)
    with torch.inference_mode():
        expected = references.run_reference(reference, images).tokens
        assert references.distance(model.forward_features(images), expected) < TINY


def test_config_without_model_type_is_named(tmp_path: Path) -> None:
    references.save_model("vit", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"}))
    with pytest.raises(
        vitlib.VitlibError, match="beside this file has no model_type, and"
    ) as error:
        vitlib.load(tmp_path)
    assert "48, MLP 96 and patches of 8x8: write it there, or state num_heads=" in str(error.value)
    assert vitlib.load(tmp_path, num_heads=4).config.num_heads == 4
    path.write_text(json.dumps(config))
    assert vitlib.load(tmp_path).config.num_heads == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 12), ("layer_norm_eps", 1e-6), ("hidden_act", "gelu_new")],
)
def test_config_without_model_type_is_compared(key: str, value: Any, tmp_path: Path) -> None:
    """Its shape is that of published models, whose numbers would be taken."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    own = hf.ViTConfig(**sizes, num_hidden_layers=1, image_size=32, patch_size=16)
    references.randomise(hf.ViTModel(own)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    kind = config.pop("model_type")
    path.write_text(json.dumps(config))
    before = vitlib.load(tmp_path).config
    path.write_text(json.dumps(config | {key: value}))
    log = f"config.json has no model_type, and {key} {value!r} .* write the model_type there"
    with pytest.raises(vitlib.VitlibError, match=log):
        vitlib.load(tmp_path)
    path.write_text(json.dumps({**config, key: value, "model_type": kind}))
    assert vitlib.load(tmp_path).config != before


def test_bare_beit_without_positions_is_not_dinov3(tmp_path: Path) -> None:
    reference = references.randomise(
        hf.BeitModel(references.beit_config(use_relative_position_bias=False))
    )
    reference.save_pretrained(tmp_path / "expected")
    file = bare(tmp_path / "expected", tmp_path / "bare")
    model = vitlib.load(file, num_heads=4, architecture="beit")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = reference(images).pooler_output
        assert model.config.rope is None
        assert references.distance(model(images), expected) < TINY


def test_architecture_contradicting_config_is_refused(tmp_path: Path) -> None:
    references.save_model("vit", tmp_path)
    with pytest.raises(vitlib.VitlibError, match=r"config\.json says 'vit'"):
        vitlib.load(tmp_path, architecture="deit")
    vitlib.load(tmp_path, architecture="ViTForImageClassification")


def test_bare_file_uses_stated_pool(tmp_path: Path) -> None:
    references.save_model("dinov3", tmp_path / "expected")
    file = bare(tmp_path / "expected", tmp_path / "bare")
    model = vitlib.load(file, num_heads=4, pool="mean")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = model.forward_features(images)
        assert torch.equal(model(images), tokens[:, model.num_prefix_tokens :].mean(dim=1))
